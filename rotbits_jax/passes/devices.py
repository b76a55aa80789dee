"""Applies a function of one layer to several layers, on one device or side by side."""

from collections.abc import Callable, Sequence
from concurrent import futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.system import host

Core = Callable[..., Any]
Settings = tuple[tuple[str, Any], ...]


def map_layers(
  mesh: jax.sharding.Mesh | None,
  core: Core,
  arguments: Sequence[tuple[Any, ...]],
  **static: Any,
) -> list[Any]:
  """Applies a pure function of one layer to several layers.

  If there is one layer for each device of the mesh, `shard_map` runs the layers side by
  side. The program for one layer is the same in both cases, so its results are the
  same. The call does not wait for the results.

  Args:
    mesh: devices along one axis, 'layers'; None for one device.
    core: the function. It takes arrays, or PyTrees of arrays, and `static`.
    arguments: the positional arguments of `core` for each layer.
    static: hashable settings, the keyword arguments of `core`.

  Returns:
    The result for each layer, on the layer's device.
  """
  settings = tuple(sorted(static.items(), key=lambda item: item[0]))
  if mesh is not None and len(arguments) == mesh.size > 1:
    specs = {str(jax.tree.map(_spec, x)) for x in arguments}
    if len(specs) == 1:
      return _map_over_mesh(core, arguments, settings, mesh)
  return [_jitted(core, settings)(*_together(own)) for own in arguments]


def side_by_side(core: Core, arguments: Sequence[jax.Array]) -> list[Any]:
  """Returns the results of a pure function of one array, computed in threads."""
  compiled = _jitted(core, ())

  def call(x: jax.Array) -> Any:
    with host.own_settings():
      return jax.block_until_ready(compiled(x))

  with futures.ThreadPoolExecutor(len(arguments)) as pool:
    return list(pool.map(call, arguments))


def _together(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
  """Puts the arguments on the device of the first of them."""
  arrays = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
  return jax.device_put(arguments, arrays[0].device) if arrays else arguments


def _spec(x: Any) -> Any:
  return tuple(np.shape(x)), str(jnp.result_type(x))


@functools.cache
def _jitted(core: Core, settings: Settings) -> Core:
  return jax.jit(functools.partial(core, **dict(settings)))


@functools.cache
def _sharded(core: Core, settings: Settings, mesh: jax.sharding.Mesh) -> Core:
  one = functools.partial(core, **dict(settings))

  def local(arguments: Any) -> Any:  # applies `core` to the layer of one device
    result = one(*jax.tree.map(lambda x: x[0], arguments))
    return jax.tree.map(lambda x: x[None], result)

  spec = jax.sharding.PartitionSpec('layers')
  return jax.jit(
    jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  )


def _map_over_mesh(
  core: Core,
  arguments: Sequence[tuple[Any, ...]],
  settings: Settings,
  mesh: jax.sharding.Mesh,
) -> list[Any]:
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('layers'))
  devices = list(mesh.devices.flat)

  def join(*layers: Any) -> jax.Array:
    shards = [jax.device_put(x, d)[None] for x, d in zip(layers, devices, strict=True)]
    shape = (len(shards), *shards[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)

  joined = jax.tree.map(join, *arguments)
  leaves, treedef = jax.tree.flatten(_sharded(core, settings, mesh)(joined))
  placed = [{x.device: x.data[0] for x in leaf.addressable_shards} for leaf in leaves]
  return [
    jax.tree.unflatten(treedef, [x[device] for x in placed]) for device in devices
  ]
