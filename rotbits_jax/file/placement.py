"""Places decoded arrays on devices, by a sharding or a function that returns one."""

from collections.abc import Callable
import math
from typing import Any

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import sources

Place = (
  jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
)
"""The sharding of all arrays, or a function of a path and a shape that returns one, or
None for an array that is committed to no device."""


def placed(tree: Any, place: Place) -> Any:
  """Puts nested dicts on devices; the arrays of a leaf have the sharding of its path.

  Every process has the whole arrays, of which its devices get their parts.
  """

  def put_array(keys: tuple[Any, ...], array: Any) -> jax.Array:
    names = [x.key for x in keys if isinstance(x, jax.tree_util.DictKey)]
    return put(array, _sharding(place, '/'.join(names), array.shape))

  return jax.tree_util.tree_map_with_path(put_array, tree)


def put(array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """Puts an array on devices; numbers of 64 bits keep them whatever JAX is set to."""
  with jax.enable_x64(True):
    if sharding is None or sharding.is_fully_addressable:
      return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def placed_like(old: Any, new: Any) -> Any:
  """Returns an array, or a structured leaf, where the old one is, if a JAX array."""
  if structured.is_structured(new):
    return jax.tree.map(placed_like, old, new)
  if structured.is_structured(old):  # the file has its array
    old = next((x for x in jax.tree.leaves(old) if x.shape == new.shape), new)
  sharding = getattr(old, 'sharding', None)
  if sharding is None:
    return new
  # `jax.eval_shape` on a mesh with explicit axes names no devices.
  is_abstract = isinstance(getattr(sharding, 'mesh', None), jax.sharding.AbstractMesh)
  is_committed = getattr(old, 'committed', True) and not is_abstract
  return put(new, sharding if is_committed else None)


def restored(like: Any, content: Any) -> Any:
  """Returns decoded content in the structure of a PyTree, and where its arrays are.

  A ValueError says that one of both is a `Model` and the other is not, that the configs
  differ, or which array differs.
  """
  is_model = isinstance(content, models.Model)
  if is_model != isinstance(like, models.Model):
    if is_model:
      raise ValueError('the file holds a model: leave out `like`, or give a Model')
    raise ValueError('`like` is a Model, but the file holds none')
  if is_model and like.config != content.config:
    raise ValueError('the config of the model in the file differs from that of `like`')
  tree = sources.unflatten_like(like, content)
  return jax.tree.map(placed_like, like, tree, is_leaf=structured.is_structured)


def _sharding(
  place: Place, path: str, shape: tuple[int, ...]
) -> jax.sharding.Sharding | None:
  """Returns the sharding of an array, whose axes are whole if devices do not divide."""
  sharding = place(path, shape) if callable(place) else place
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  spec = []
  for length, names in zip(shape, sharding.spec, strict=False):
    axes = names if isinstance(names, tuple) else (names,)
    devices = math.prod(sharding.mesh.shape[x] for x in axes if x is not None)
    spec.append(None if length % devices else names)
  return jax.sharding.NamedSharding(
    sharding.mesh, jax.sharding.PartitionSpec(*spec), memory_kind=sharding.memory_kind
  )


def on_device(tree: Any) -> Any:
  """Returns a PyTree with JAX arrays; on CPUs they share the memory of NumPy arrays."""
  leaves, structure = jax.tree.flatten(tree)

  def stays(x: Any) -> bool:
    is_array = isinstance(x, np.ndarray) and x.dtype.itemsize == 8
    return is_array and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype

  # At once, because a call takes longer than a small array does.
  moved = iter(jax.device_put([x for x in leaves if not stays(x)]))
  placed = [x if stays(x) else next(moved) for x in leaves]
  return jax.tree.unflatten(structure, placed)
