"""Shared parts of the commands: running one, its errors, reading a model.

A command is a module with a docstring, which is its help; flags; and `main`, which
returns its output: the JSON object of --json, and the text for people; or None.

Exit codes: 0 success; 2 bad input, with one line on stderr and nothing written; 130
interrupted. Any other exception is a fault of this program, raised with its traceback.
"""

from collections.abc import Mapping
import decimal
import inspect
import json
import logging
import pathlib
import re
import sys
import traceback
import types
from typing import Any

from absl import flags
import jax
import numpy as np

import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax.file import shards
from rotbits_jax.system import cache
from rotbits_jax.system import host
from rotbits_jax.system.text import printable

Result = tuple[dict[str, Any], str]
"""The JSON object and the text that a command prints."""

BAD_INPUT = 2
INTERRUPTED = 130

DTYPES = 'float32', 'bfloat16', 'float16'
"""The values of the flag --dtype."""

JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')
VERBOSE = flags.DEFINE_bool('verbose', False, 'Print more, and tracebacks of errors.')


# Flags of several commands: function, default (... if it is required), purpose.
_SHARED: dict[str, tuple[Any, Any, str]] = {
  'input': (flags.DEFINE_string, ..., 'A file of `encode`.'),
  'checkpoint': (flags.DEFINE_string, ..., 'A directory with weights, or their file.'),
  'base': (
    flags.DEFINE_multi_string,
    None,
    'The base; repeat it for bases of it.',
  ),
  'against': (flags.DEFINE_string, None, 'The checkpoint that was encoded.'),
  'overwrite': (flags.DEFINE_bool, False, 'Replace existing files.'),
}


def shared(*names: str) -> list[flags.FlagHolder[Any]]:
  """Defines flags that several commands have."""
  holders = []
  for name in names:
    define, default, purpose = _SHARED[name]
    holders.append(define(name, None if default is ... else default, purpose))
    if default is ...:
      flags.mark_flag_as_required(name)
  return holders


def run(command: types.ModuleType) -> int:
  """Parses `sys.argv`, runs a command, prints its result and returns the exit code."""
  if '--help' in sys.argv or '-h' in sys.argv:
    modules = command, sys.modules[__name__]  # flags that commands share
    helps = map(flags.FLAGS.module_help, modules)
    print(inspect.getdoc(command), *helps, sep='\n\n')
    return 0
  try:
    _parse()
    logging.getLogger('jax').setLevel(logging.ERROR)  # hides "no GPU found"
    _keep_compiled_programs()
    with host.own_settings():
      result = command.main()
  except KeyboardInterrupt:
    return INTERRUPTED
  except Exception as error:
    # JAX_PLATFORMS may name devices that are not there.
    is_of_platform = str(error).startswith('Unable to initialize backend')
    if not (isinstance(error, ValueError | OSError | flags.Error) or is_of_platform):
      raise
    if flags.FLAGS['verbose'].value:
      traceback.print_exc()
    name = command.__name__.rpartition('.')[2]
    print(f'rotbits {name}: {_one_line(error)}', file=sys.stderr)
    return BAD_INPUT
  if result is not None and JSON.value:
    print(json.dumps(result[0], allow_nan=False))
  elif result is not None:
    print('\n'.join(map(printable, result[1].split('\n'))))
  return 0


def warn(text: str) -> None:
  """Prints a warning on stderr."""
  print(f'warning: {printable(text)}', file=sys.stderr)


def read_model(path: str, base: Any = None) -> rotbits_jax.Checkpoint:
  """Reads a checkpoint, or decodes a rotbits file, which may need a base."""
  if shards.is_encoded(path):
    return rotbits_jax.decode_checkpoint(path, base=base, progress=True)
  return rotbits_jax.load_checkpoint(path)


def read_tokens(path: str, files: Mapping[str, bytes]) -> np.ndarray:
  """Reads a UTF-8 text as tokens of the tokenizer among the files of a model."""
  return evaluation.encode_text(files, pathlib.Path(path).read_text('utf-8-sig'))


def parse_size(flag: flags.FlagHolder[Any]) -> int | None:
  """Parses the value of a flag as a number of bytes, like 2GB, 1.5MB or 3000000."""
  if flag.value is None:
    return None
  pattern = r'(\d{1,12}(?:\.\d{1,3})?)(KB|MB|GB|)'
  match = re.fullmatch(pattern, flag.value.strip(), re.ASCII)
  factors = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}
  size = int(decimal.Decimal(match[1]) * factors[match[2]]) if match else 0
  if not size:
    raise ValueError(f'--{flag.name} must be a size like 2GB, got {flag.value!r}')
  return size


def _parse() -> None:
  """Parses `sys.argv`; all errors, also those of a config file, are flags.Error."""
  flags.FLAGS.unparse_flags()  # an earlier run in this process may have left values
  try:
    unused = flags.FLAGS([_with_path_of_config(x) for x in sys.argv])[1:]
  except flags.Error as error:
    # An error of a config file comes with its traceback.
    text = re.sub(r'Traceback.*\n(?=\S)', '', str(error), flags=re.DOTALL)
    raise flags.Error(text) from error
  except Exception as error:  # a config file is Python, which may raise anything
    name = type(error).__name__
    raise flags.Error(f'the config cannot be used: {name}: {error}') from error
  if unused:
    raise flags.Error(f'unexpected argument {unused[0]!r}')


def _with_path_of_config(argument: str) -> str:
  """Replaces the name in --config=NAME[:ARGUMENT] by the path of the config file."""
  match = re.fullmatch(r'(--?config=)(\w+)(:.*)?', argument)
  if match is None or not (path := config_folder() / f'{match[2]}.py').exists():
    return argument
  return f'{match[1]}{path}{match[3] or ""}'


def config_folder() -> pathlib.Path:
  """Returns the folder of config files: in the package, or in a clone beside it."""
  package = pathlib.Path(__file__).parents[1]
  installed = package / 'configs'
  return installed if installed.is_dir() else package.with_name('configs')


def _keep_compiled_programs() -> None:
  """Lets JAX keep compiled programs, so that a command starts with earlier ones'."""
  if jax.config.jax_compilation_cache_dir is None:
    try:
      cache.root().mkdir(parents=True, exist_ok=True)
    except OSError:
      return
    jax.config.update('jax_compilation_cache_dir', str(cache.root()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _one_line(error: BaseException) -> str:
  """Returns the message of an error on one line, in the words of the command line."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    text = f'{error.filename}: {error.strerror}'
  else:
    text = ' '.join(str(error).split()) or type(error).__name__
  return printable(text.replace('overwrite=True', '--overwrite'))
