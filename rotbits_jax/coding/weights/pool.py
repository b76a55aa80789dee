"""The threads that code blocks, one pool for the process.

Jobs are leaves: none of them waits for another, so several callers may share the pool.
Their JAX programs run on the processor, because their data is in its memory.
"""

from collections.abc import Callable, Iterable
from concurrent import futures
import functools
import os
import threading
from typing import TypeVar

import jax

_Result = TypeVar('_Result')

_lock = threading.Lock()
_pools: list[futures.ThreadPoolExecutor] = []


def threads() -> int:
  """How many threads the pool has: one for each processor of this process."""
  count = getattr(os, 'process_cpu_count', os.cpu_count)
  return count() or 1


def run(jobs: Iterable[Callable[[], _Result]]) -> list[_Result]:
  """Runs jobs side by side.

  Args:
    jobs: functions of no arguments that do not call `run` themselves.

  Returns:
    What they return, in order.

  Raises:
    Exception: what the first failing job raised, when all jobs have ended.
  """
  waiting = list(jobs)
  if len(waiting) < 2:
    return [_on_processor(job) for job in waiting]
  pool = _pool()
  started = [pool.submit(_on_processor, job) for job in waiting]
  futures.wait(started)
  return [job.result() for job in started]


def _pool() -> futures.ThreadPoolExecutor:
  with _lock:
    if not _pools:
      _pools.append(futures.ThreadPoolExecutor(threads(), 'rotbits'))
    return _pools[0]


def _on_processor(job: Callable[[], _Result]) -> _Result:
  with jax.default_device(_processor()):
    return job()


@functools.cache
def _processor() -> jax.Device | None:
  """None, the default device, if JAX was told to use no processor."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None
