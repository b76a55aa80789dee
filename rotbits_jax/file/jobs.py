"""Jobs that code records, in the threads of `pool`."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import sys
from typing import Any
import weakref

import jax

from rotbits_jax import pool


@contextlib.contextmanager
def started() -> Iterator[Callable[[Callable[[], Any]], 'futures.Future[Any]']]:
  """Yields a function that starts jobs, which begin in their order.

  At the end, or when an exception leaves the context, jobs that have not begun are
  cancelled and the others are waited for. A generator that nobody uses any more does
  not wait: it ends in any thread and at any time, also when this thread holds a lock
  that the others need.
  """
  # Futures that are done leave the set with their results when nobody needs them.
  pending = weakref.WeakSet[futures.Future[Any]]()
  device = jax.config.jax_default_device  # settings are those of a thread

  def start(job: Callable[[], Any]) -> 'futures.Future[Any]':
    def on_device() -> Any:
      with jax.default_device(device):
        return job()

    future = pool.submit(on_device)
    pending.add(future)
    return future

  try:
    yield start
  finally:
    left = [x for x in list(pending) if not x.cancel()]
    if not isinstance(sys.exception(), GeneratorExit):
      futures.wait(left)
