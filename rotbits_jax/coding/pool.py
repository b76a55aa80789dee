"""The pools of threads that code blocks and records. The process has one of each.

A job of `run` waits for no other job: if it calls `run`, its thread does these jobs in
turn. So several callers may share the pool. A job of `record_jobs` may call `run` and
wait for earlier jobs of `record_jobs`. Several of them run side by side, because one of
them does not always have work for all threads.
The JAX programs of `run` run on the CPU, because their data is in its memory.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import functools
import os
import threading
from typing import Any, TypeVar

import jax

from rotbits_jax.system import host

_Result = TypeVar('_Result')

_lock = threading.Lock()
_pools: dict[str, futures.ThreadPoolExecutor] = {}
_local = threading.local()


def threads() -> int:
  """Returns the number of threads: one for each CPU that this process may use."""
  count = getattr(os, 'process_cpu_count', os.cpu_count)
  return count() or 1


def run(jobs: Iterable[Callable[[], _Result]]) -> list[_Result]:
  """Runs functions without arguments side by side, and returns their results in order.

  Raises the exception of the first job that failed, after all jobs have ended.
  """
  if getattr(_local, 'pool', None) == 'blocks':
    return [job() for job in jobs]
  started = [_pool('blocks').submit(job) for job in jobs]
  futures.wait(started)
  try:
    return [future.result() for future in started]
  finally:
    # The exception of a job refers to these frames, which must not refer to the job.
    started.clear()


def each(function: Callable[..., _Result], *arguments: Iterable[Any]) -> list[_Result]:
  """Calls a function for arguments side by side, as `map` does in turn."""
  return run(functools.partial(function, *x) for x in zip(*arguments, strict=True))


Start = Callable[[Callable[[], _Result]], 'futures.Future[_Result]']
"""Takes a function of no arguments and returns the future of its result."""


@contextlib.contextmanager
def record_jobs() -> Iterator[Start]:
  """Yields a function that starts jobs, on one more thread than processors.

  Jobs begin in their order.
  At the end, or when an exception leaves the context, jobs that have not begun are
  cancelled and the others are waited for. A generator that nobody uses any more does
  not wait: it ends in any thread and at any time, also when this thread holds a lock
  that the others need.
  """
  # Futures that are done leave the set, because they hold their results.
  pool, started = _pool('records'), set[futures.Future[Any]]()
  device = jax.config.jax_default_device  # settings are those of a thread

  def on_device(job: Callable[[], _Result]) -> _Result:
    with jax.default_device(device):
      return job()

  def start(job: Callable[[], _Result]) -> 'futures.Future[_Result]':
    future = pool.submit(on_device, job)
    started.add(future)
    future.add_done_callback(started.discard)
    return future

  is_dropped = False
  try:
    yield start
  except GeneratorExit:
    is_dropped = True
    raise
  finally:
    left = list(started)
    for future in left:
      future.cancel()
    if not is_dropped:
      futures.wait(left)


def _pool(name: str) -> futures.ThreadPoolExecutor:
  with _lock:
    if name not in _pools:
      # One more than processors, because a thread often waits for Python's lock.
      _pools[name] = futures.ThreadPoolExecutor(
        threads() + 1, f'rotbits-{name}', _set, (name,)
      )
    return _pools[name]


def _set(name: str) -> None:
  """Gives JAX the settings of this package in this thread, for good."""
  settings = contextlib.ExitStack()
  settings.enter_context(host.own_settings())
  # Programs take NumPy arrays, which are in the memory of the processor already.
  settings.enter_context(jax.default_device(host.device()))
  _local.pool = name
  _local.settings = settings  # a context ends when nothing refers to it
