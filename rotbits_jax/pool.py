"""The threads, which all packages share. The process has one pool of them.

A thread of the pool that calls `run` does the jobs itself, and those that have nothing
else to do help it. So a call ends even if no other thread is free, and while there are
enough records, each has one thread. The JAX programs of `run` run on the CPU, because
their data is in its memory.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import functools
import os
import sys
import threading
from typing import Any, TypeVar
import weakref

import jax

from rotbits_jax.system import host

_Result = TypeVar('_Result')

_local = threading.local()


def threads() -> int:
  """Returns the number of threads: one for each CPU that this process may use."""
  count = getattr(os, 'process_cpu_count', os.cpu_count)
  return count() or 1


def run(jobs: Iterable[Callable[[], _Result]]) -> list[_Result]:
  """Runs functions without arguments side by side, and returns their results in order.

  If jobs fail, it raises the exception of one of them when no other job is running.
  """
  if not hasattr(_local, 'settings'):
    return _POOL.submit(lambda: run(jobs)).result()
  todo = list(jobs)
  results: list[Any] = [None] * len(todo)
  places = iter(range(len(todo)))  # a thread takes the next one

  def work() -> None:
    with jax.default_device(host.device()):
      for i in places:
        results[i] = todo[i]()

  helpers = [_POOL.submit(work) for _ in range(min(len(todo), threads()) - 1)]
  try:
    work()
  finally:
    list(places)
    futures.wait(x for x in helpers if not x.cancel())
  for helper in helpers:
    if not helper.cancelled():
      helper.result()
  # Cancelled helpers stay in the queue, but what they would work on can go.
  found, todo, results = results, [], []
  return found


def each(function: Callable[..., _Result], *arguments: Iterable[Any]) -> list[_Result]:
  """Calls a function for arguments side by side, as `map` does in turn."""
  return run(functools.partial(function, *x) for x in zip(*arguments, strict=True))


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

    future = _POOL.submit(on_device)
    pending.add(future)
    return future

  try:
    yield start
  finally:
    left = [x for x in list(pending) if not x.cancel()]
    if not isinstance(sys.exception(), GeneratorExit):
      futures.wait(left)


def _set() -> None:
  """Gives JAX the settings of this package in this thread, for good."""
  settings = contextlib.ExitStack()
  settings.enter_context(host.thread_settings())
  # Programs take NumPy arrays, which are in the memory of the processor already.
  settings.enter_context(jax.default_device(host.device()))
  _local.settings = settings  # a context ends when nothing refers to it


def _in_child() -> None:
  """Lets the child of a fork refuse jobs, for which it has no threads."""

  def refuse(*_: Any) -> Any:
    raise RuntimeError('JAX does not work after a fork; start processes by "spawn"')

  if _POOL._threads:
    _POOL.submit = refuse  # type: ignore[assignment, method-assign]


PLANS = threading.Semaphore(max(threads() // 2, 1))
"""Held by threads that plan, which others would hold up: NumPy's short calls take turns
at Python's lock. Meanwhile those code what is planned."""

_POOL = futures.ThreadPoolExecutor(threads(), 'rotbits', _set)
if hasattr(os, 'register_at_fork'):  # not on Windows
  os.register_at_fork(after_in_child=_in_child)
