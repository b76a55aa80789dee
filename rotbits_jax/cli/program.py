"""Shared parts of the commands: running one, its errors, reading a model.

A command is a module with a docstring, which is its help; flags; and `main`, which
takes its paths and returns a `Result` or None. Exit codes are those of `main.USAGE`.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import inspect
import json
import logging
import os
import pathlib
import re
import signal
import sys
import types
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax.file import shards
from rotbits_jax.system import files as files_lib
from rotbits_jax.system import host
from rotbits_jax.system.text import printable

Result = tuple[dict[str, Any], str]  # the JSON object and the text of a command


class Failed(NamedTuple):
  """A `Result` that is printed, and ends the command with exit code 2."""

  values: dict[str, Any]
  text: str


# Arguments of Python in errors, which are flags here.
_PYTHON = re.compile(r'\b(overwrite|all_files)=True|\b(base=)|\b(exclude=)(?=\[)')

JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')

# Flags of several commands: the function that defines each, its default and purpose.
_SHARED: dict[str, tuple[Callable[..., Any], Any, str]] = {
  'base': (flags.DEFINE_multi_string, None, 'A base; repeat it for its own base.'),
  'against': (flags.DEFINE_string, None, 'A model or an encoded file to compare with.'),
  'overwrite': (flags.DEFINE_bool, False, 'Replace existing files.'),
}


def shared(*names: str) -> list[flags.FlagHolder[Any]]:
  """Defines flags that several commands have."""
  return [_SHARED[name][0](name, *_SHARED[name][1:]) for name in names]


def run(command: types.ModuleType) -> int:
  """Parses `sys.argv`, runs a command, prints its result and returns the exit code."""
  name = command.__name__.rpartition('.')[2]
  signature = inspect.signature(command.main)
  word = lambda x: x.name.upper() if x.default is x.empty else f'[{x.name.upper()}]'
  words = ' '.join(map(word, signature.parameters.values()))
  usage = f'rotbits {name} {words} [--FLAG=VALUE ...]'
  if {'--help', '-h'} & {*sys.argv}:
    text = inspect.getdoc(command) or ''
    text = text if '--help' in sys.argv else text.partition('\n')[0]
    print(text, usage, _flags_help(command.__name__, __name__), sep='\n\n')
    return 0
  try:
    paths = _parse()
    try:
      signature.bind(*paths)
    except TypeError as error:
      raise flags.Error(f'{error}; usage: {usage}') from error
    logging.getLogger('jax').setLevel(logging.ERROR)  # hides "no GPU found"
    with host.own_settings(), _loops_of_links():
      result = command.main(*paths)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `head` may stop
    if result is not None and JSON.value:
      print(json.dumps(result[0], allow_nan=False), flush=True)
    elif result is not None:
      print('\n'.join(map(printable, result[1].split('\n'))), flush=True)
  except (ValueError, OSError, flags.Error) as error:
    print(f'rotbits {name}: {_one_line(error)}', file=sys.stderr)
    return 2
  except (MemoryError, jax.errors.JaxRuntimeError) as error:  # of NumPy, and of XLA
    if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    print(f'rotbits {name}: too little memory: {_one_line(error)}', file=sys.stderr)
    return 1
  return 2 if isinstance(result, Failed) else 0


def read_model(path: str, base: Any = None) -> rotbits_jax.Checkpoint:
  """Reads a checkpoint, or decodes a rotbits file, which may need a base."""
  if shards.is_encoded(path):
    return rotbits_jax.decode_checkpoint(path, base=base, progress=True)
  return rotbits_jax.load_checkpoint(path)


def read_tokens(path: str, files: Mapping[str, bytes]) -> np.ndarray:
  """Reads a UTF-8 text as tokens of the tokenizer among the files of a model."""
  text = files_lib.local_path(path).read_text('utf-8-sig')
  return evaluation.encode_text(files, text)


def parse_size(flag: flags.FlagHolder[Any]) -> int | None:
  """Parses the value of a flag as a number of bytes, like 2GB, 1.5MB or 3000000."""
  if flag.value is None:
    return None
  match = re.fullmatch(r'([0-9]{1,12}(?:\.[0-9]{1,3})?)(KB|MB|GB|)', flag.value.strip())
  factors = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}
  size = round(float(match[1]) * factors[match[2]]) if match else 0
  if not size:
    raise ValueError(f'--{flag.name} must be a size like 2GB, got {flag.value!r}')
  return size


def _flags_help(*modules: str) -> str:
  """Returns a line for each flag that the modules define."""
  lines = []
  for flag in (x for y in modules for x in flags.FLAGS.get_flags_for_module(y)):
    name = flag.name if flag.boolean else f'{flag.name}={flag.name.upper()}'
    text = flag.help.partition(';\n')[0]  # absl adds a line about repetition
    default = f' (default: {flag.default})' if flag.default else ''
    lines.append(f'  --{name:<23} {text}{default}')
  return '\n'.join(sorted(lines))


def _parse() -> list[str]:
  """Parses `sys.argv`, and returns the paths; all errors are flags.Error."""
  flags.FLAGS.set_gnu_getopt(True)  # flags may follow paths
  try:
    paths: list[str] = flags.FLAGS([_expanded(x) for x in sys.argv])[1:]
  except Exception as error:  # a config file is Python, which may raise anything
    # An error of a config file comes with its traceback.
    text = re.sub(r'Traceback.*\n(?=\S)', '', str(error), flags=re.DOTALL)
    text = text.removeprefix('ERROR:: ')  # of absl, about a flag file
    if isinstance(error, AttributeError | KeyError):
      text = '--config has no ' + text.strip('"')
    raise flags.Error(text or type(error).__name__) from error
  return paths


def _expanded(argument: str) -> str:
  """Expands `~` in a path or --FLAG=PATH, and NAME in --config=NAME[:ARGUMENT]."""
  parts = argument.partition('=') if argument.startswith('-') else (argument,)
  argument = ''.join(map(os.path.expanduser, parts))
  match = re.fullmatch(r'(--?config=)(\w+)(.*)', argument)
  if match is None or not (path := config_folder() / f'{match[2]}.py').exists():
    return argument
  return f'{match[1]}{path}{match[3]}'


@contextlib.contextmanager
def _loops_of_links() -> Iterator[None]:
  """Turns the error of a loop of symbolic links into an OSError.

  `Path.resolve` raises a RuntimeError before Python 3.13.
  """
  try:
    yield
  except RuntimeError as error:
    if not str(error).startswith('Symlink loop'):
      raise
    raise OSError(str(error)) from error


def config_folder() -> pathlib.Path:
  """Returns the folder of config files: in the package, or in a clone beside it."""
  package = pathlib.Path(__file__).parents[1]
  folders = package / 'configs', package.parent / 'configs'
  return next(filter(pathlib.Path.is_dir, folders))


def _one_line(error: BaseException) -> str:
  """Returns the message of an error on one line, in the words of the command line."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    text = f'{error.filename}: {error.strerror}'
  else:
    text = ' '.join(str(error).split()) or type(error).__name__
  return printable(re.sub(_PYTHON, r'--\1\2\3', text))
