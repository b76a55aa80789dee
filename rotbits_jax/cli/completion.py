"""Prints a script that completes commands, flags and their values in a shell.

  rotbits completion --shell=bash|zsh|fish

Example:

  source <(rotbits completion --shell=bash)

The line goes into ~/.bashrc or, with --shell=zsh, into ~/.zshrc. For fish:

  rotbits completion --shell=fish > ~/.config/fish/completions/rotbits.fish

JSON:

  script  the script
"""

from collections.abc import Iterable
import importlib
import shlex

from absl import flags

from rotbits_jax.cli import main as main_lib
from rotbits_jax.cli import program

FLAGS = program.Flags()
_SHELL = FLAGS.add(
  'shell', 'The shell to complete in.', ('bash', 'zsh', 'fish'), required=True
)

_BASH = """\
_rotbits() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} flag= words=
  # Bash takes --flag=value for three words.
  if [[ $current == = ]]; then
    flag=${{COMP_WORDS[COMP_CWORD-1]}} current=
  elif [[ ${{COMP_WORDS[COMP_CWORD-1]}} == = ]]; then
    flag=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  if (( COMP_CWORD == 1 )); then
    words={commands}
  elif [[ $flag ]]; then
    case $command$flag in
{values}
      *) COMPREPLY=($(compgen -f -- "$current")); return;;
    esac
  else
    case $command in
{flags}
    esac
    compopt -o nospace 2>/dev/null
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -F _rotbits rotbits"""


def main() -> program.Result:
  commands = {name: _flags_of(name) for name in main_lib.COMMANDS}
  if _SHELL.value == 'fish':
    script = fish(commands)
  else:
    zsh = _SHELL.value == 'zsh'
    script = 'autoload -U +X bashcompinit && bashcompinit\n' if zsh else ''
    script += bash(commands)
  return {'script': script}, script


def bash(commands: dict[str, list[flags.Flag]]) -> str:
  """Returns the script for bash, given the flags of each command."""
  values = [
    f'      {name}--{flag.name}) words={_words(_values(flag))};;'
    for name, own in commands.items()
    for flag in own
    if _values(flag)
  ]
  lines = [
    f'      {name}) words={_words(_spelling(flag) for flag in own)};;'
    for name, own in commands.items()
  ]
  return _BASH.format(
    commands=_words(commands), values='\n'.join(values), flags='\n'.join(lines)
  )


def fish(commands: dict[str, list[flags.Flag]]) -> str:
  """Returns the script for fish, given the flags of each command."""
  lines = ['complete -c rotbits -f -n __fish_use_subcommand']
  for name, own in commands.items():
    purpose = shlex.quote(main_lib.COMMANDS[name])
    lines.append(f'complete -c rotbits -n __fish_use_subcommand -a {name} -d {purpose}')
    for flag in own:
      words = f' -a {_words(_values(flag))}' if _values(flag) else ''
      value = '' if flag.boolean else f' -r{words}'
      lines.append(
        f"complete -c rotbits -n '__fish_seen_subcommand_from {name}' "
        f'-l {flag.name}{value} -d {shlex.quote(flag.help)}'
      )
  return '\n'.join(lines)


def _flags_of(command: str) -> list[flags.Flag]:
  defined = importlib.import_module(f'rotbits_jax.cli.{command}').FLAGS.values
  found = {defined[name].name: defined[name] for name in defined}
  return [found[name] for name in sorted(found)]


def _spelling(flag: flags.Flag) -> str:
  return f'--{flag.name}' if flag.boolean else f'--{flag.name}='


def _values(flag: flags.Flag) -> list[str]:
  return list(getattr(flag.parser, 'enum_values', None) or [])


def _words(words: Iterable[str]) -> str:
  return shlex.quote(' '.join(words))
