"""Shared parts of the commands: their flags, running one, its errors, reading a model.

A command is a module with a docstring, which is its help, `FLAGS`, and `main`, which
returns its output: the JSON object of --json, and the text for people.

Exit codes: 0 success; 1 a fault of this program, with its traceback; 2 bad input, with
one line on stderr and nothing written; 130 interrupted; 129 and 143 ended by SIGHUP and
SIGTERM.
"""

from collections.abc import Callable, Mapping, Sequence
import decimal
import difflib
import json
import logging
import os
import pathlib
import re
import sys
import traceback
from typing import Any

from absl import flags
import jax
import numpy as np

import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax.cli import help as help_lib
from rotbits_jax.file import savings
from rotbits_jax.file import shards
from rotbits_jax.system import cache
from rotbits_jax.system import config_files
from rotbits_jax.system import host
from rotbits_jax.system import interrupts
from rotbits_jax.system import status
from rotbits_jax.system.text import printable

Result = tuple[dict[str, Any], str | None]
"""The JSON object and the text that a command prints."""

BAD_INPUT = 2  # bad flags, too

DTYPES = 'float32', 'bfloat16', 'float16'
"""The values of the flag --dtype."""

_DEFINE: dict[type, Callable[..., flags.FlagHolder[Any]]] = {
  str: flags.DEFINE_string,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_bool,
}


class Flags:
  """Defines the flags of a command, and --json and --verbose, which every one has."""

  def __init__(self, *, first: str | None = None) -> None:
    """Defines the flags of every command.

    Args:
      first: the flag whose value may be given as the first argument, without its name.
    """
    self.first = first
    self.values = flags.FlagValues()
    self.required: list[str] = []
    self._sources: list[str] = []
    self.json = self.add(
      'json',
      'Print one JSON object on one line.',
      bool,
      False,
      module_name=help_lib.COMMON,
    )
    self.verbose = self.add(
      'verbose',
      'Print more: every row of a report, the traceback of an error.',
      bool,
      False,
      short_name='v',
      module_name=help_lib.COMMON,
    )

  def add(
    self,
    name: str,
    help: str,
    kind: type | Sequence[str] = str,
    default: Any = None,
    *,
    source: bool = False,
    **options: Any,
  ) -> flags.FlagHolder[Any]:
    """Defines a flag.

    Args:
      name: name of the flag.
      help: its purpose.
      kind: type of its value: str, int, float or bool; or the words that it may be.
      default: its value if it is not given.
      source: whether it is the path of a checkpoint or of an encoded file.
      options: keywords of absl's function, such as `required` and `lower_bound`.
    """
    if source:
      self._sources.append(name)
    if options.get('required'):
      self.required.append(name)
    options['flag_values'] = self.values
    if not isinstance(kind, type):
      return flags.DEFINE_enum(name, default, kind, help, **options)
    return _DEFINE[kind](name, default, help, **options)

  def bases(self) -> flags.FlagHolder[Any]:
    """Defines the flag --base, which may be given several times."""
    self._sources.append('base')
    return flags.DEFINE_multi_string(
      'base',
      None,
      'The model beside which the file is encoded: a checkpoint or an encoded file. If '
      'it is a file with a base of its own, give that one next, by another --base.',
      flag_values=self.values,
    )

  def config(self, help: str) -> flags.FlagHolder[Any]:
    """Defines the flag --config: the path or the name of a config file."""
    from ml_collections import config_flags  # slow to import

    return config_flags.DEFINE_config_file(
      'config', None, help, flag_values=self.values
    )

  def fields(self, config: flags.FlagHolder[Any]) -> dict[str, Any] | None:
    """Returns the fields of --config; None if it is not given.

    Raises:
      ValueError: if its function returns something else than a config.
    """
    if not config.present:
      return None
    if not hasattr(config.value, 'to_dict'):  # it raises if the file was not read
      kind = type(config.value).__name__
      raise ValueError(f'get_config() of --config returns {kind}, and no ConfigDict')
    fields: dict[str, Any] = config.value.to_dict()
    return fields

  def check_paths(self) -> None:
    """Checks that sources are paths, and not addresses or names of models.

    Nor is a source or the output `-`, which other programs take for a pipe.

    Raises:
      ValueError: if one is not. It says how to get the files.
    """
    for name in {*self._sources, 'output'} & {*self.values}:
      if self.values[name].value == '-':
        raise ValueError(f'--{name}=- is no file; pipes are not supported')
    for name in self._sources:
      value = self.values[name].value
      for path in value if isinstance(value, list) else [value]:
        self._check_source(name, path)

  def _check_source(self, name: str, path: str | None) -> None:
    if path is None:
      return
    if re.match(r'\w+://', path):
      raise ValueError(f'{path}: not a local path; copy the files to a folder first')
    is_name = name != 'input' and re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', path)
    if is_name and not os.path.exists(path):
      raise ValueError(
        f'{path}: No such file or directory; a model of the Hugging Face Hub is '
        f'downloaded by: hf download {path} --local-dir {path.split("/")[1]}'
      )


def run(command: Callable[[], Result | None], own: Flags | flags.FlagValues) -> int:
  """Parses `sys.argv`, runs a command and prints its result.

  For bad input, it prints one line to stderr. Any other exception is a fault of this
  program and is raised with its traceback.

  Args:
    command: the function to run. The docstring of its module is the help text. It may
      print by itself and return None.
    own: the flags of the command.

  Returns:
    The exit code.
  """
  values = own.values if isinstance(own, Flags) else own
  module = sys.modules[command.__module__]
  name = f'rotbits {pathlib.Path(str(module.__file__)).stem}'
  arguments = sys.argv[1:]
  if '--help' in arguments or '-h' in arguments:
    status.clear()
    required = own.required if isinstance(own, Flags) else []
    print(help_lib.text(module, values, required))
    return 0
  logging.getLogger('jax').setLevel(logging.ERROR)  # hides messages like "no GPU found"
  _keep_programs()
  try:
    with interrupts.raised():
      try:
        _parse(values, own.first if isinstance(own, Flags) else None)
        if isinstance(own, Flags):
          own.check_paths()
        with host.own_settings():
          result = command()
      finally:
        status.clear()
      if result is not None and values['json'].value:
        print(json.dumps(result[0], allow_nan=False))
      elif result is not None and result[1] is not None:
        print(result[1])
      sys.stdout.flush()
  except KeyboardInterrupt as error:
    for note in getattr(error, '__notes__', ()):  # on the files that are kept
      print(f'{name}: {printable(note)}', file=sys.stderr)
    return interrupts.exit_code(error)
  except BrokenPipeError:
    raise
  except Exception as error:
    if not _is_bad_input(error):
      raise
    if 'verbose' in values and values['verbose'].value:
      traceback.print_exc()
    hint = f'; see {name} --help' if isinstance(error, flags.Error) else ''
    print(f'{name}: {one_line(error)}{hint}', file=sys.stderr)
    return BAD_INPUT
  return 0


def _is_bad_input(error: Exception) -> bool:
  """Returns whether an error is one of the input, and not of this program."""
  if isinstance(error, RuntimeError):  # JAX_PLATFORMS names devices that are not there
    return str(error).startswith('Unable to initialize backend')
  return isinstance(error, ValueError | OSError | flags.Error)


def _keep_programs() -> None:
  """Lets JAX keep compiled programs in the user's cache directory.

  A command then starts with the programs of earlier ones. A folder that the user has
  given to JAX, as by JAX_COMPILATION_CACHE_DIR, is not changed.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  try:
    folder = cache.root()
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  if not os.access(folder, os.W_OK | os.X_OK):  # JAX would warn of each program
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  # JAX keeps only programs that took a second to compile, unless told otherwise. Many
  # of these take less.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def one_line(error: BaseException) -> str:
  """Returns the message of an error on one line, for users of the command line."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    text = f'{error.filename}: {error.strerror}'
  else:
    text = ' '.join(str(error).split()) or type(error).__name__
  return printable(text.replace('overwrite=True', '--overwrite'))


def warn(text: str) -> None:
  """Prints a warning on stderr."""
  print(f'warning: {printable(text)}', file=sys.stderr)


def report_text(report: savings.Report, verbose: bool) -> str:
  """Returns a report as text."""
  return report.to_text(verbose=verbose)


def read_model(path: str, base: Any = None) -> rotbits_jax.Checkpoint:
  """Reads a checkpoint from its directory, its weights file, or a rotbits file.

  Args:
    path: the path.
    base: the base that a rotbits file needs, see `rotbits_jax.decode`.

  Raises:
    ValueError: if a checkpoint is given a base.
  """
  if shards.is_encoded(path):
    return rotbits_jax.decode_checkpoint(path, base=base, progress=True)
  if base:
    raise ValueError(f'{path}: a checkpoint needs no base')
  return rotbits_jax.load_checkpoint(path)


def read_tokens(
  files: Mapping[str, bytes], config: rotbits_jax.ModelConfig, text: str
) -> np.ndarray:
  """Converts a text to tokens of a checkpoint: int32 `[N]`.

  Args:
    files: the files beside its weights.
    config: of its model.
    text: the text.

  Raises:
    ValueError: if the checkpoint has no tokenizer, or that of another model.
  """
  tokens = evaluation.encode_text(files, text)
  count = config.vocab_size
  if tokens.max(initial=0) >= count:
    raise ValueError(
      f'the tokenizer.json beside the model is that of another model: it makes token '
      f'{tokens.max()}, and the model has {count} tokens'
    )
  return tokens


def parse_size(name: str, text: str | None) -> int | None:
  """Parses a number of bytes like 2GB, 1.5MB or 3000000.

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
  found = re.fullmatch(r'(\d{1,12}(?:\.\d{1,3})?)(KB|MB|GB|)', text.strip(), re.ASCII)
  units = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}
  size = int(decimal.Decimal(found[1]) * units[found[2]]) if found else 0
  if not size:
    raise ValueError(f'--{name} must be a size like 2GB or 500MB, got {text!r}')
  return size


def is_gguf(path: str) -> bool:
  """Returns whether a checkpoint is a GGUF file, which comes back as safetensors."""
  return pathlib.Path(path).suffix == '.gguf'


def read_text(path: str) -> str:
  """Reads a text file.

  Raises:
    ValueError: if the text is not UTF-8 or has no words.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not a text in UTF-8: {error.reason}') from error
  if not text.strip():
    raise ValueError(f'{path}: the text has no words')
  return text


def _parse(values: flags.FlagValues, first: str | None) -> None:
  """Parses `sys.argv`; the first argument without a flag belongs to flag `first`."""
  values.unparse_flags()  # an earlier run in this process may have left values
  given: list[str] = []
  for x in sys.argv:
    before = given[-1] if len(given) > 1 else ''
    name = before.lstrip('-')
    is_value = before != name and name in values and not values[name].boolean
    if before in ('-config', '--config'):
      x = f'{given.pop()}={x}'
    elif first and given and not x.startswith('-') and not is_value:
      x, first = f'--{first}={x}', None
    given.append(config_files.named('config', x))
  try:
    unused = values(given)[1:]
  except flags.UnrecognizedFlagError as error:
    near = difflib.get_close_matches(error.flagname, list(values), 1)
    meant = f'; did you mean --{near[0]}?' if near else ''
    raise flags.Error(f'unknown flag --{error.flagname}{meant}') from error
  except flags.Error as error:
    # absl says "Flag --x must have a value other than None."
    missing = re.search(r'flag (--\w+)=None: Flag', str(error))
    text = f'{missing[1]}=... is missing' if missing else str(error)
    # An error of a config file comes with its traceback.
    raise flags.Error(re.sub(r'Traceback.*\n(?=\S)', '', text, flags=re.S)) from error
  except Exception as error:  # of a config file, because it is Python
    name = type(error).__name__
    raise ValueError(f'the config cannot be used: {name}: {error}') from error
  if unused:
    raise ValueError(f'unexpected argument {unused[0]!r}')
