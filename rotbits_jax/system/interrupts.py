"""Signals that ask the process to end, as exceptions that are not lost.

Python raises the exception of a signal in whatever code runs at that moment. If the
garbage collector called this code, the exception is printed and forgotten. So the
handler leaves a note, too, and `check` raises the exception again.
"""

from collections.abc import Iterator
import contextlib
import signal
from typing import Any


class Stopped(KeyboardInterrupt):
  """A signal that asks the process to end. Incomplete outputs are then removed.

  Attributes:
    signal: number of the signal.
  """

  def __init__(self, number: int):
    """Stores the number of the signal."""
    super().__init__()
    self.signal = number


_pending: Stopped | None = None


@contextlib.contextmanager
def raised() -> Iterator[None]:
  """Raises `Stopped` for SIGINT, SIGTERM and SIGHUP, in the main thread.

  A signal that the process ignores, as nohup ignores SIGHUP, stays ignored. An error
  after a signal counts as the signal.
  """
  global _pending
  once = [signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)]

  def stop(number: int, frame: Any) -> None:
    global _pending
    for each in once:  # a second signal must not interrupt the removal of outputs
      signal.signal(each, signal.SIG_IGN)
    _pending = Stopped(number)
    raise _pending

  found = {each: signal.getsignal(each) for each in (signal.SIGINT, *once)}
  for each, handler in found.items():
    if handler not in (signal.SIG_IGN, None):
      signal.signal(each, stop)
  try:
    yield
  except Exception:
    check()  # an import that a signal interrupts may end in an ImportError
    raise
  finally:
    _pending = None
    for each, handler in found.items():
      if handler is not None:
        signal.signal(each, handler)


def check() -> None:
  """Raises the exception of a signal that has come.

  Raises:
    Stopped: if a signal has come since `raised` began.
  """
  if _pending is not None:
    raise _pending


def exit_code(error: KeyboardInterrupt) -> int:
  """Returns the exit code of a process that a signal ended, as shells give it."""
  return 128 + getattr(error, 'signal', signal.SIGINT)
