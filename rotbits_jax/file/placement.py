"""Places decoded arrays on devices, by a sharding or a function that returns one."""

from collections.abc import Callable, Iterable, Mapping
import functools
import math
from typing import Any

import jax
import numpy as np

from rotbits_jax import structured

Place = (
  jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
)
"""The sharding of all arrays, or a function of a path and a shape that returns one, or
None for an array that is committed to no device."""


def placed(
  flat: Mapping[str, Any],
  place: Place | None,
  wanted: range | None = None,
  total: int = 0,
) -> dict[str, Any]:
  """Puts leaves on devices; the arrays of a leaf have the sharding of its path.

  Of stacked leaves this process holds the layers `wanted` of `total`.
  """
  if place is None:
    return dict(flat)

  def put_array(path: str, array: Any) -> jax.Array:
    shape = array.shape if wanted is None else (total, *array.shape[1:])
    sharding = _sharding(place, path, shape)
    if wanted is None or sharding is None:  # then `local_layers` are all of them
      return put(array, sharding)

    def part(index: Any) -> Any:
      start, stop, _ = index[0].indices(total)
      rows = slice(start - wanted.start, stop - wanted.start)
      return array[(rows, *index[1:])]

    with jax.enable_x64(True):  # see `put`
      return jax.make_array_from_callback(shape, sharding, part)

  return {
    path: jax.tree.map(functools.partial(put_array, path), leaf)
    for path, leaf in flat.items()
  }


def put(array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """Puts an array on devices; numbers of 64 bits keep them whatever JAX is set to."""
  with jax.enable_x64(True):
    return jax.device_put(array, sharding)


def placed_like(old: Any, new: Any) -> Any:
  """Returns an array, or a structured leaf, where an old one is.

  Beside a NumPy array or None, new arrays remain where they are.
  """
  if structured.is_structured(new):
    return jax.tree.map(placed_like, old, new)
  if structured.is_structured(old):  # the file has its array
    old = next((x for x in jax.tree.leaves(old) if x.shape == new.shape), new)
  if old is None or isinstance(old, np.ndarray | np.generic):
    return new
  sharding = getattr(old, 'sharding', None)
  # `jax.eval_shape` on a mesh with explicit axes names no devices.
  is_abstract = isinstance(getattr(sharding, 'mesh', None), jax.sharding.AbstractMesh)
  is_committed = getattr(old, 'committed', True) and not is_abstract
  return put(new, sharding if is_committed else None)


def local_layers(
  place: Place, name: str, shapes: Iterable[tuple[str, tuple[int, ...]]], count: int
) -> range:
  """Returns which of the `count` layers of a stack devices of this process get.

  `shapes` has the path and shape of the arrays of one of its layers.
  """
  first, last = count, 0
  for path, shape in shapes:
    sharding = _sharding(place, f'{name}/{path}', (count, *shape))
    if sharding is None:
      return range(count)
    for index in sharding.addressable_devices_indices_map((count, *shape)).values():
      start, stop, _ = index[0].indices(count) if index else (0, count, 1)
      first, last = min(first, start), max(last, stop)
  return range(min(first, last), last)


def _sharding(
  place: Place, path: str, shape: tuple[int, ...]
) -> jax.sharding.Sharding | None:
  """Returns the sharding of an array; None if it is committed to no device.

  An axis whose length the devices do not divide is not divided. A vector beside a
  matrix has the first axes of the sharding only. The axes of the mesh become `Auto`,
  because `scan` refuses stacks that are divided along an `Explicit` axis.
  """
  sharding = place(path, shape) if callable(place) else place
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  spec = []
  for length, names in zip(shape, sharding.spec, strict=False):
    axes = names if isinstance(names, tuple) else (names,)
    devices = math.prod(sharding.mesh.shape[x] for x in axes if x is not None)
    spec.append(None if length % devices else names)
  mesh = sharding.mesh
  if isinstance(mesh, jax.sharding.Mesh):
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
  return jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*spec), memory_kind=sharding.memory_kind
  )


def on_device(tree: Any) -> Any:
  """Returns a PyTree with JAX arrays; on a CPU they share the memory of NumPy arrays.

  A NumPy array whose dtype JAX would narrow stays.
  """

  def move(x: Any) -> Any:
    keeps = (
      isinstance(x, np.ndarray) and jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype
    )
    return jax.device_put(x) if keeps else x

  return jax.tree.map(move, tree)
