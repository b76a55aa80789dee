"""Progress on stderr: a bar in a terminal; in a pipe or a log, a line every minute."""

from collections.abc import Iterable, Iterator
import contextlib
import sys
import time
from typing import Self, TypeVar

import tqdm

from rotbits_jax.system import interrupts
from rotbits_jax.system import status
from rotbits_jax.system import text as text_lib

T = TypeVar('T')

_SECONDS = 60.0  # time between two lines if stderr is not a terminal


class Progress:
  """A context manager that shows the progress of a task whose size is known.

  Units of the name 'B' are bytes.

  Attributes:
    shown: whether anything is shown.
  """

  def __init__(self, task: str, total: int, unit: str, *, show: bool):
    """Starts the task.

    Args:
      task: name of the task, a word.
      total: number of units of the task.
      unit: name of a unit.
      show: whether to show anything.
    """
    self._task, self._total, self._unit = task, total, unit
    self._done, self._stage = 0, ''
    self._started = self._told = time.monotonic()
    self._first = 0, self._started  # the count at the beginning, and its time
    show = show and sys.stderr is not None  # as with pythonw
    terminal = status.is_terminal()
    self.shown, self._lines = show, show and not terminal
    if show:
      status.clear()
    self._bar = tqdm.tqdm(
      total=total,
      desc=task,
      unit=unit if unit == 'B' else f' {unit}s',
      unit_scale=unit == 'B',
      disable=not (show and terminal),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self._bar.close()

  def stage(self, name: str) -> None:
    """Sets the name of the current step, which is shown beside the progress."""
    self._stage = name
    self._bar.set_postfix_str(name)
    self._tell()

  def update(self, count: int = 1) -> None:
    """Counts `count` more units as done.

    Raises:
      Stopped: if a signal has come whose exception was lost, see `interrupts`.
    """
    interrupts.check()
    self._done += count
    if not self._first[0]:
      # Programs are compiled for the first unit. The time of the others is like that of
      # those to come.
      self._first = self._done, time.monotonic()
    self._bar.update(count)
    self._tell()

  def finish(self) -> None:
    """Counts the rest as done, if a search ends before its greatest length."""
    self.update(self._total - self._done)

  def say(self, text: str) -> None:
    """Shows a line at once."""
    if not self.shown:
      return
    if self._lines:
      with contextlib.suppress(OSError):  # whoever read it is gone; the work goes on
        print(f'{self._task}: {text}', file=sys.stderr, flush=True)
    else:
      self._bar.write(f'{self._task}: {text}', file=sys.stderr)

  def _tell(self) -> None:
    now = time.monotonic()
    if not self._lines or now - self._told < _SECONDS:
      return
    self._told = now
    spent = now - self._started
    if self._unit == 'B':
      text = f'{text_lib.of_bytes(self._done)} of {text_lib.of_bytes(self._total)}'
    else:
      text = f'{self._done} of {self._total} {self._unit}s'
    text += f', {_clock(spent)}'
    done, since = self._first
    if self._done > done:
      to_go = (now - since) / (self._done - done) * (self._total - self._done)
      text += f', {_clock(to_go)} to go'
    self.say(text + (f' ({self._stage})' if self._stage else ''))


def track(
  items: Iterable[T], task: str, unit: str, *, total: int, show: bool
) -> Iterator[T]:
  """Yields the units of a task, `total` of them, and shows its `Progress`."""
  with Progress(task, total, unit, show=show) as progress:
    for item in items:
      yield item
      progress.update()


def _clock(seconds: float) -> str:
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
