"""Places decoded arrays on devices, by a sharding or a function that returns one."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from rotbits_jax import structured
from rotbits_jax.file import manifest as manifest_lib

Tree = dict[str, Any]
Place = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""The sharding of all arrays, or a function of a path and a shape that returns one."""


def _sharding(place: Place, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
  return place(path, shape) if callable(place) else place


def placed(tree: Tree, place: Place | None) -> Tree:
  """Puts arrays on devices; the arrays of a leaf have the sharding of its path."""
  if place is None:
    return tree
  flat = {}
  for path, leaf in structured.flatten(tree).items():
    put = lambda x, path=path: jax.device_put(x, _sharding(place, path, x.shape))
    if isinstance(leaf, structured.UniformlyQuantized):
      sharding = _of_step(_sharding(place, path, leaf.shape), leaf.step.ndim)
      step = jax.device_put(leaf.step, sharding)
      flat[path] = dataclasses.replace(leaf, integers=put(leaf.integers), step=step)
    else:
      flat[path] = jax.tree.map(put, leaf)
  return structured.unflatten(flat)


def local_layers(
  place: Place, name: str, entry: manifest_lib.Record, count: int
) -> range:
  """Returns the places in a stack of layers that devices of this process get.

  Args:
    place: the sharding.
    name: the name of the stack.
    entry: the entry of one of its layers.
    count: the number of its layers.
  """
  first, last = count, 0
  for leaf, specs in entry.leaf_specs():
    for spec in specs:
      shape = (count, *(leaf.shape if leaf.is_array else spec.shape))
      sharding = _sharding(place, f'{name}/{leaf.path}', shape)
      for index in sharding.addressable_devices_indices_map(shape).values():
        start, stop, _ = index[0].indices(count) if index else (0, count, 1)
        first, last = min(first, start), max(last, stop)
  return range(min(first, last), last)


def placed_stack(tree: Tree, place: Place | None, wanted: range, total: int) -> Tree:
  """Puts stacks on devices, of which this process may hold only some layers."""
  if place is None:
    return tree

  def put(stack: Any, sharding: Callable[..., jax.sharding.Sharding]) -> jax.Array:
    shape = (total, *stack.shape[1:])

    def part(index: Any) -> Any:
      start, stop, _ = index[0].indices(total)
      rows = slice(start - wanted.start, stop - wanted.start)
      return np.asarray(stack)[(rows, *index[1:])]

    return jax.make_array_from_callback(shape, sharding(shape), part)

  flat = {}
  for path, leaf in structured.flatten(tree).items():
    own = functools.partial(_sharding, place, path)
    if isinstance(leaf, structured.UniformlyQuantized):
      whole = (total, *leaf.shape[1:])
      of_step = lambda shape, own=own, whole=whole: _of_step(own(whole), len(shape))
      integers, step = put(leaf.integers, own), put(leaf.step, of_step)
      flat[path] = dataclasses.replace(leaf, integers=integers, step=step)
    else:
      flat[path] = jax.tree.map(lambda x, own=own: put(x, own), leaf)
  return structured.unflatten(flat)


def _of_step(sharding: jax.sharding.Sharding, axes: int) -> jax.sharding.Sharding:
  """Returns the sharding of the step of a leaf, which has the first axes only.

  Args:
    sharding: that of the integers.
    axes: how many axes the step has.
  """
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  spec = jax.sharding.PartitionSpec(*sharding.spec[:axes])
  return jax.sharding.NamedSharding(
    sharding.mesh, spec, memory_kind=sharding.memory_kind
  )
