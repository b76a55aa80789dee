"""Signals that end a program, and how it ends."""

from collections.abc import Iterator
import contextlib
import math
import os
import signal
import sys
import threading
import time
import types
from typing import Any, NoReturn

_NAMES = 'SIGINT', 'SIGTERM', 'SIGHUP'  # Windows lacks the last one
_NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_MOMENT = 5.0  # seconds in which several signals are one


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
  """Lets the signals that end a program wait until the end of the context."""
  if threading.current_thread() is not threading.main_thread():  # gets no signals
    yield
    return
  received: list[int] = []

  def note(number: int, frame: types.FrameType | None) -> None:
    del frame
    received.append(number)

  handlers: dict[int, Any] = {}
  try:
    for number in _NUMBERS:
      if signal.getsignal(number) not in (signal.SIG_IGN, None):
        handlers[number] = signal.signal(number, note)
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    if received:
      signal.raise_signal(received[0])


class Ending:
  """Turns signals that end a program into KeyboardInterrupt, so it can clean up.

  A terminal that closes, or `timeout`, sends several. Those of a moment are one,
  because another exception would stop the cleaning. Ignored signals remain ignored.
  """

  def __init__(self) -> None:
    """Lets signals end the process at once: nothing has been written yet."""
    self.number: int | None = None  # of the last signal
    self._time = -math.inf
    self._handlers: dict[int, Any] = {}
    for number in _NUMBERS:
      handler = signal.getsignal(number)
      if handler in (signal.SIG_DFL, signal.default_int_handler):
        self._handlers[number] = handler
        # Modules of jaxlib turn an interrupt of their import into an error.
        signal.signal(number, signal.SIG_DFL)

  @contextlib.contextmanager
  def raised(self) -> Iterator[None]:
    """Lets signals raise KeyboardInterrupt until the end of the context."""
    try:
      for number in self._handlers:
        signal.signal(number, self._handle)
      yield
    finally:
      for number, handler in self._handlers.items():
        signal.signal(number, handler)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if time.monotonic() - self._time < _MOMENT:
      return
    self.number, self._time = number, time.monotonic()
    raise KeyboardInterrupt

  def exit(self) -> NoReturn:
    """Ends the process with the exit code of the signal.

    It does not wait for threads: one whose start was interrupted would never end.
    """
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):
        stream.flush()
    os._exit(128 + (self.number or signal.SIGINT))

  def repeat(self, error: Any) -> None:
    """Repeats an interrupt after a callback in which Python would only print it."""
    if isinstance(error.exc_value, KeyboardInterrupt):
      self._time = -math.inf
      number = self.number or signal.SIGINT
      threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    else:
      sys.__unraisablehook__(error)
