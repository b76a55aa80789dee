"""Progress on stderr, drawn by tqdm."""

from collections.abc import Iterable
import sys
from typing import Any

import tqdm


class Progress(tqdm.tqdm):
  """A progress bar of a task with `total` units, which it yields if they are given.

  In a pipe or a log, which keep each state on a line, it is shown once a minute.
  """

  def __init__(
    self,
    task: str,
    total: int,
    unit: str,
    *,
    show: bool,
    units: Iterable[Any] | None = None,
  ):
    pause = 0.0 if sys.stderr is not None and sys.stderr.isatty() else 60.0
    super().__init__(
      units,
      total=total,
      desc=task,
      unit=unit if unit == 'B' else f' {unit}s',
      unit_scale=unit == 'B',
      disable=not show or sys.stderr is None,
      mininterval=max(pause, 0.1),
      delay=pause,
    )

  def stage(self, name: str) -> None:
    """Sets the name of the current step, which is shown beside the progress."""
    if not self.disable:
      self.set_postfix_str(name, refresh=self.mininterval < 1)
