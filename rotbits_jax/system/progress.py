"""Progress on stderr, drawn by tqdm."""

from collections.abc import Iterable, Iterator
import sys
from typing import TypeVar

import tqdm

T = TypeVar('T')


class Progress(tqdm.tqdm):
  """A progress bar of a task whose size is known; a context manager.

  In a pipe or a log, which keep each state on a line of its own, it is shown once a
  minute. Units of the name 'B' are bytes.
  """

  def __init__(self, task: str, total: int, unit: str, *, show: bool):
    """Starts the task.

    Args:
      task: name of the task, a word.
      total: number of units of the task.
      unit: name of a unit.
      show: whether to show anything.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    super().__init__(
      total=total,
      desc=task,
      unit=unit if unit == 'B' else f' {unit}s',
      unit_scale=unit == 'B',
      disable=not show or sys.stderr is None,
      mininterval=0.1 if is_terminal else 60.0,
      delay=0.0 if is_terminal else 60.0,
    )

  def stage(self, name: str) -> None:
    """Sets the name of the current step, which is shown beside the progress."""
    if not self.disable:
      self.set_postfix_str(name, refresh=self.mininterval < 1)

  def finish(self) -> None:
    """Counts the rest as done, if a search ends before its greatest length."""
    self.update(self.total - self.n)


def track(
  items: Iterable[T], task: str, unit: str, *, total: int, show: bool
) -> Iterator[T]:
  """Yields the units of a task, `total` of them, and shows its `Progress`."""
  with Progress(task, total, unit, show=show) as progress:
    for item in items:
      yield item
      progress.update()
