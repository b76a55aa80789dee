"""Loops over small arrays, compiled as one native function on the CPU.

XLA compiles a loop for the CPU in one of two ways: as one native function, or as a
program of *thunks*, one for each operation, which an executor runs step by step and
divides among a pool of threads. A step over a few hundred bytes takes 0.1 us the first
way and 2 to 30 us the second way, the more the more cores there are. XLA chooses by its
version and by the bytes that the loop touches. An attribute of the program makes it
choose the first way; no flag of the process is needed.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar

import jax
from jax.experimental import xla_metadata

_Function = TypeVar('_Function', bound=Callable[..., Any])

_ATTRIBUTES = {'xla_cpu_small_call': 'true', 'inlineable': 'false'}


def loop(function: _Function) -> _Function:
  """Returns a function that is compiled as one native function on CPUs.

  On other platforms it is compiled as usual. A native function runs on one thread, and
  cannot contain a scatter with several indices, a sort or a call of a library. Under
  `vmap` an update at an index that is batched becomes such a scatter.

    >>> import jax.numpy as jnp
    >>> double = lambda i, x: x + x
    >>> doubled = loop(lambda x, n: jax.lax.fori_loop(0, n, double, x))
    >>> jax.jit(doubled)(jnp.ones(2), 3).tolist()
    [8.0, 8.0]

  Args:
    function: takes positional PyTrees of arrays; returns a PyTree of arrays.

  Returns:
    The function.
  """

  def call(*arguments: Any) -> Any:
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    compiled = jax.jit(functools.partial(jax.core.eval_jaxpr, traced.jaxpr))

    def on_cpu(*operands: Any) -> Any:
      # XLA aborts if an operand of a native function is a large constant.
      operands = jax.lax.optimization_barrier(operands)
      with xla_metadata.set_xla_metadata(**_ATTRIBUTES):
        return compiled(*operands)

    # Outside a program, the attribute would be that of a whole program, and XLA aborts.
    chosen = functools.partial(jax.lax.platform_dependent, cpu=on_cpu, default=compiled)
    results = jax.jit(chosen)(traced.consts, *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)

  return call  # type: ignore[return-value]
