"""Loops over small arrays, compiled as one native function on the CPU.

XLA compiles a loop for the CPU as one native function, or as *thunks*, one for each
operation, of which a step takes 2 to 30 us in place of 0.1. An attribute chooses.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar

import jax
from jax.experimental import xla_metadata

_Function = TypeVar('_Function', bound=Callable[..., Any])


def loop(function: _Function) -> _Function:
  """Returns a function of positional PyTrees as one native function on CPUs.

  It runs on one thread, and cannot contain a scatter with several indices, a sort or a
  call of a library. Under `vmap` an update at a batched index becomes such a scatter.
  """

  def call(*arguments: Any) -> Any:
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    compiled = jax.jit(functools.partial(jax.core.eval_jaxpr, traced.jaxpr))

    def on_cpu(*operands: Any) -> Any:
      # XLA aborts if an operand of a native function is a large constant.
      operands = jax.lax.optimization_barrier(operands)
      with xla_metadata.set_xla_metadata(xla_cpu_small_call='true', inlineable='false'):
        return compiled(*operands)

    # Outside a program, the attribute would be that of a whole program, and XLA aborts.
    chosen = functools.partial(jax.lax.platform_dependent, cpu=on_cpu, default=compiled)
    results = jax.jit(chosen)(traced.consts, *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)

  return call  # type: ignore[return-value]
