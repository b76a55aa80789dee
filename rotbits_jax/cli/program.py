"""What the commands share: running one, its errors, and reading a model."""

from collections.abc import Callable, Iterator
import contextlib
import inspect
import json
import logging
import os
import pathlib
import re
import signal
import sys
from typing import Any

from absl import flags
import safetensors

import rotbits_jax
from rotbits_jax.file import container
from rotbits_jax.file import fields

BAD_INPUT = 2

# What names a checkpoint's file, so that a damaged one is not taken for an encoded one.
_CHECKPOINT_SUFFIXES = ('.bin', '.gguf', '.json', '.pt', '.safetensors')


class Stopped(KeyboardInterrupt):
  """A signal that asks the process to end; what is half-written is removed.

  Attributes:
    signal: its number.
  """

  def __init__(self, number: int):
    """Keeps the number of the signal."""
    super().__init__()
    self.signal = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
  """Makes signals that end a process an exception, as SIGINT is one."""
  handled = [signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)]

  def stop(number: int, frame: Any) -> None:
    for each in handled:  # the next one does not disturb the removal
      signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)

  found = {each: signal.getsignal(each) for each in handled}
  for each, handler in found.items():
    if handler not in (signal.SIG_IGN, None):  # it is ignored under nohup
      signal.signal(each, stop)
  try:
    yield
  finally:
    for each, handler in found.items():
      if handler is not None:
        signal.signal(each, handler)


def run(command: Callable[[], None], flag_values: flags.FlagValues) -> int:
  """Parses `sys.argv` and runs a command.

  Bad input ends with one line on stderr; any other exception is a fault of this
  program and keeps its traceback.

  Args:
    command: what to run; the docstring of its module is the help text.
    flag_values: the command's flags.

  Returns:
    The exit code.
  """
  module = sys.modules[command.__module__]
  name = f'rotbits {pathlib.Path(str(module.__file__)).stem}'
  arguments = sys.argv[1:]
  if '--help' in arguments or '-h' in arguments:
    print(f'{inspect.getdoc(module)}\n\nflags:{_flags_help(flag_values)}')
    return 0
  logging.getLogger('jax').setLevel(logging.ERROR)  # not "no GPU found" and the like
  try:
    with _signals():
      _parse(flag_values)
      command()
      sys.stdout.flush()
  except Stopped as error:
    return 128 + error.signal  # as shells have it
  except KeyboardInterrupt:
    return 128 + signal.SIGINT
  except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (ValueError, OSError, flags.Error) as error:
    print(f'{name}: {one_line(error)}', file=sys.stderr)
    return BAD_INPUT
  return 0


def one_line(error: BaseException) -> str:
  """An error's message on one line."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    return fields.printable(f'{error.filename}: {error.strerror}')
  return fields.printable(' '.join(str(error).split())) or type(error).__name__


def print_json(value: dict[str, Any]) -> None:
  """Prints a JSON object on one line."""
  print(json.dumps(value, allow_nan=False))


def read_model(path: str) -> rotbits_jax.Checkpoint:
  """Reads a checkpoint's directory, its weights file, or a rotbits file."""
  if _is_container(path):
    return rotbits_jax.decode_checkpoint(path, progress=True)
  return rotbits_jax.load_checkpoint(path)


def parse_size(name: str, text: str | None) -> int | None:
  """A count of bytes, like 2GB or 500MB.

  Raises:
    ValueError: if it is none.
  """
  if text is None:
    return None
  found = re.fullmatch(r'(\d{1,12})(|KB|MB|GB)', text.strip(), re.ASCII)
  if found is None or not int(found[1]):
    raise ValueError(f'--{name} must be a size like 2GB or 500MB, got {text!r}')
  return int(found[1]) * {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}[found[2]]


def read_text(path: str) -> str:
  """Reads a text file.

  Raises:
    ValueError: if it is not UTF-8 or has no words.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not a text in UTF-8: {error.reason}') from error
  if not text.strip():
    raise ValueError(f'{path}: the text has no words')
  return text


def _is_container(path: str) -> bool:
  """Whether a path is that of an encoded file, of shards, or of their index."""
  if not os.path.isfile(path):
    return os.path.isfile(f'{path}.index.json')
  if path.endswith('.index.json') and not path.endswith('.safetensors.index.json'):
    return True
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      return (file.metadata() or {}).get('format') == container.FORMAT
  except safetensors.SafetensorError:  # damaged, or no safetensors file at all
    return pathlib.Path(path).suffix not in _CHECKPOINT_SUFFIXES


def _parse(flag_values: flags.FlagValues) -> None:
  try:
    unused = flag_values(sys.argv)[1:]
  except flags.Error:
    raise
  except Exception as error:  # what a config file raises: it is Python
    name = type(error).__name__
    raise ValueError(f'the config cannot be used: {name}: {error}') from error
  if unused:
    raise ValueError(f'unexpected argument {unused[0]!r}')


def _flags_help(flag_values: flags.FlagValues) -> str:
  return flag_values.get_help(prefix='', include_special_flags=False).partition(':')[2]
