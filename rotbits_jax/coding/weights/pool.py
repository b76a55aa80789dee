"""The pool of threads that code blocks. The process has one.

No job waits for another job, so several callers may share the pool. The JAX programs of
jobs run on the CPU, because their data is in its memory.
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
  """Returns the number of threads: one for each CPU that this process may use."""
  count = getattr(os, 'process_cpu_count', os.cpu_count)
  return count() or 1


def run(jobs: Iterable[Callable[[], _Result]]) -> list[_Result]:
  """Runs jobs side by side.

  Args:
    jobs: functions without arguments that do not call `run`.

  Returns:
    The results of the jobs, in order.

  Raises:
    Exception: the exception of the first job that failed, after all jobs have ended.
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
  """Returns JAX's CPU; None, the default device, if JAX was told not to use the CPU."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None
