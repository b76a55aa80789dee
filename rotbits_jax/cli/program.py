"""Shared parts of the commands: running one, its errors, and reading a model.

Exit codes: 0 success; 1 a fault of this program, with its traceback; 2 bad input, with
one line on stderr and nothing written; 130 interrupted; 129 and 143 ended by SIGHUP and
SIGTERM.
"""

from collections.abc import Callable
import inspect
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import sys
import traceback
from typing import Any

from absl import flags
import jax

import rotbits_jax
from rotbits_jax.file import container
from rotbits_jax.file import fields
from rotbits_jax.system import config_files
from rotbits_jax.system import interrupts

BAD_INPUT = 2  # bad flags, too

# A file with such a suffix belongs to a checkpoint, even if it is damaged and cannot be
# read as one.
_CHECKPOINT_SUFFIXES = ('.bin', '.gguf', '.json', '.pt', '.safetensors')


def define_output_flags(
  flag_values: flags.FlagValues,
) -> tuple[flags.FlagHolder[bool], flags.FlagHolder[bool]]:
  """Defines the flags that every command has.

  Returns:
    The flags --json and --verbose.
  """
  json_flag = flags.DEFINE_bool(
    'json', False, 'Print one JSON object on one line.', flag_values=flag_values
  )
  verbose = flags.DEFINE_bool(
    'verbose',
    False,
    'Print more: every row of a report, the traceback of an error.',
    short_name='v',
    flag_values=flag_values,
  )
  return json_flag, verbose


def define_config_flag(flag_values: flags.FlagValues, help: str) -> flags.FlagHolder:
  """Defines the flag --config. Its value is the path or the name of a config file."""
  from ml_collections import config_flags  # slow to import

  return config_flags.DEFINE_config_file('config', None, help, flag_values=flag_values)


def run(command: Callable[[], None], flag_values: flags.FlagValues) -> int:
  """Parses `sys.argv` and runs a command.

  For bad input, it prints one line to stderr. Any other exception is a fault of this
  program and is raised with its traceback.

  Args:
    command: the function to run. The docstring of its module is the help text.
    flag_values: the flags of the command.

  Returns:
    The exit code.
  """
  module = sys.modules[command.__module__]
  name = f'rotbits {pathlib.Path(str(module.__file__)).stem}'
  arguments = sys.argv[1:]
  if '--help' in arguments or '-h' in arguments:
    print(f'{inspect.getdoc(module)}\n\nflags:\n{_flags_help(flag_values)}')
    return 0
  logging.getLogger('jax').setLevel(logging.ERROR)  # hides messages like "no GPU found"
  _keep_programs()
  try:
    with interrupts.raised():
      _parse(flag_values)
      command()
      sys.stdout.flush()
  except KeyboardInterrupt as error:  # the exit code is the convention of shells
    return 128 + getattr(error, 'signal', signal.SIGINT)
  except BrokenPipeError:  # the reader of the pipe, such as `head`, has ended
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (ValueError, OSError, flags.Error) as error:
    if 'verbose' in flag_values and flag_values['verbose'].value:
      traceback.print_exc()
    hint = f'; see {name} --help' if isinstance(error, flags.Error) else ''
    print(f'{name}: {one_line(error)}{hint}', file=sys.stderr)
    return BAD_INPUT
  return 0


def _keep_programs() -> None:
  """Lets JAX keep compiled programs in the user's cache directory.

  A command then starts without compiling what an earlier one has compiled. What the
  user told JAX, as by JAX_COMPILATION_CACHE_DIR, stays as it is.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = os.path.join(cache, 'rotbits_jax')
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError:  # as for a user without a home
    return
  jax.config.update('jax_compilation_cache_dir', folder)
  # JAX keeps only programs that took a second to compile, unless told otherwise. Many
  # of these take less.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def one_line(error: BaseException) -> str:
  """Returns the message of an error on one line."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    return fields.printable(f'{error.filename}: {error.strerror}')
  return fields.printable(' '.join(str(error).split())) or type(error).__name__


def say(line: str) -> None:
  """Prints a line that names files, whose names may hold any characters."""
  print(fields.printable(line))


def warn(text: str) -> None:
  """Prints a warning on stderr."""
  print(f'warning: {fields.printable(text)}', file=sys.stderr)


def terminal_width() -> int | None:
  """Returns the columns of the terminal; None if stdout is a pipe or a file."""
  return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_json(value: dict[str, Any]) -> None:
  """Prints a JSON object on one line."""
  print(json.dumps(value, allow_nan=False))


def read_model(path: str) -> rotbits_jax.Checkpoint:
  """Reads a checkpoint from its directory, its weights file, or a rotbits file."""
  if _is_container(path):
    return rotbits_jax.decode_checkpoint(path, progress=True)
  return rotbits_jax.load_checkpoint(path)


def parse_size(name: str, text: str | None) -> int | None:
  """Parses a number of bytes like 2GB or 500MB.

  Args:
    name: name of the flag, for the error message.
    text: value of the flag.

  Returns:
    The number of bytes; None if the flag has no value.

  Raises:
    ValueError: if the text is not a size.
  """
  if text is None:
    return None
  found = re.fullmatch(r'(\d{1,12})(KB|MB|GB)', text.strip(), re.ASCII)
  if found is None or not int(found[1]):
    raise ValueError(f'--{name} must be a size like 2GB or 500MB, got {text!r}')
  return int(found[1]) * {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}[found[2]]


def read_text(path: str) -> str:
  """Reads a text file.

  Raises:
    ValueError: if the text is not UTF-8 or has no words.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not a text in UTF-8: {error.reason}') from error
  if not text.strip():
    raise ValueError(f'{path}: the text has no words')
  return text


def _is_container(path: str) -> bool:
  """Returns whether a path names an encoded file, its shards, or their index."""
  if not os.path.isfile(path):
    return os.path.isfile(f'{path}.index.json')
  if path.endswith('.index.json') and not path.endswith('.safetensors.index.json'):
    return True
  try:
    container.StreamReader(path)
  except container.ContainerError:  # the file is damaged or has another format
    return pathlib.Path(path).suffix not in _CHECKPOINT_SUFFIXES
  return True


def _parse(flag_values: flags.FlagValues) -> None:
  flag_values.unparse_flags()  # an earlier run in this process may have left values
  try:
    unused = flag_values([config_files.named('config', x) for x in sys.argv])[1:]
  except flags.Error as error:
    # absl says "Flag --x must have a value other than None."
    missing = re.search(r'flag (--\w+)=None: Flag', str(error))
    text = f'{missing[1]}=... is missing' if missing else str(error)
    # What a config file raises comes with its traceback.
    raise flags.Error(re.sub(r'Traceback.*\n(?=\S)', '', text, flags=re.S)) from error
  except Exception as error:  # what a config file raises: it is Python
    name = type(error).__name__
    raise ValueError(f'the config cannot be used: {name}: {error}') from error
  if unused:
    raise ValueError(f'unexpected argument {unused[0]!r}')


def _flags_help(flag_values: flags.FlagValues) -> str:
  """Returns the help of a command's own flags, then that of the flags of every command.

  absl puts flags under the names of the modules that define them, which a user need not
  know.
  """
  modules = sorted(flag_values.flags_by_module_dict(), key=lambda x: x == __name__)
  return '\n'.join(flag_values.module_help(x).partition(':\n')[2] for x in modules)
