"""Arrays that are divided along `Explicit` axes of a mesh, as `jax.make_mesh` has them.

`scan` and indexing refuse these. Along `Auto` axes, XLA chooses the communication.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar, cast

import jax

from rotbits_jax.models import names

_Function = TypeVar('_Function', bound=Callable[..., Any])

_SHARDED = jax.sharding.NamedSharding


def automatic(tree: Any) -> Any:
  """Returns a PyTree with its arrays along `Auto` axes of the same devices; no copy."""

  def move(x: Any) -> Any:
    if (sharding := _explicit(x)) is None:
      return x
    mesh = jax.sharding.Mesh(x.sharding.mesh.devices, sharding.mesh.axis_names)
    memory = x.sharding.memory_kind
    return jax.device_put(x, _SHARDED(mesh, sharding.spec, memory_kind=memory))

  return jax.tree.map(move, tree)


def with_auto_axes(function: _Function) -> _Function:
  """Lets a function of parameters, a config and arrays take `Explicit` axes.

  In its result, stacks are divided along their layers as the parameters are; other
  arrays are whole.
  """

  @functools.wraps(function)
  def call(params: Any, config: Any, *arrays: Any, **options: Any) -> Any:
    bound = lambda params, *arrays: function(params, config, *arrays, **options)
    places: dict[str, _SHARDED] = {}
    for key in params:
      for old in filter(None, map(_explicit, jax.tree.leaves(params[key]))):
        axes = old.spec[:1] if names.stacked_layers(key) else ()
        places.setdefault(key, _SHARDED(old.mesh, jax.P(*axes)))
    if not places:
      return bound(params, *arrays)

    def place(path: tuple[Any, ...], _: Any) -> _SHARDED:
      keys = [x.key for x in path if getattr(x, 'key', None) in places]
      return places[keys[0]] if keys else _SHARDED(mesh, jax.P())

    mesh = next(iter(places.values())).mesh
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, jax.typeof(x).dtype)
    result = jax.eval_shape(bound, *jax.tree.map(shape, (params, *arrays)))
    out = jax.tree_util.tree_map_with_path(place, result)
    return jax.sharding.auto_axes(bound, out_sharding=out)(params, *arrays)

  return cast(_Function, call)


def _explicit(x: Any) -> Any:
  """Returns the sharding of an array or tracer along `Explicit` axes, or None."""
  sharding = jax.typeof(x).sharding
  is_explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
  return sharding if is_explicit else None
