r"""Canonical weights of a whole model in one call: the functions of `layer`, mapped.

    jax.jit(canonicalize, static_argnums=1)(params, config)

The layers are stacked `[N, ...]`, so there is no loop over them. The rotations are the
running product R_{s+1} = O_s^T R_s, an associative scan over the layers; all else is
independent per layer. Nothing waits for the host: ranks that depend on weights
become masks. If the layer axis is sharded over devices, only the scan
communicates.

`passes` makes the same canonical form layer by layer, rounds it to the dtype of the
source, and cuts masked columns. Shape letters are those of `models.config`.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.models import meshes
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import layer as layer_lib
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations
from rotbits_jax.symmetries.layer import Params


class Gauges(NamedTuple):
  """The coordinates that `canonicalize` chose, float32, by stack as 'layers.0:16'."""

  first: jax.Array | None  # R_0, [d, d]; None if no segment is rotated
  segments: dict[str, tuple[jax.Array, ...]]  # R that sublayers write, [N, e, e] each
  singular_values: dict[str, tuple[jax.Array, ...]]  # of shortcuts, [N, d] each
  heads: dict[str, dict[str, jax.Array]]  # A of 'values' and 'keys', [N, K, h, h]


@meshes.with_auto_axes
def canonicalize(
  params: models.Params,  # see `models.Model`, in any floating-point dtype
  config: models.ModelConfig,
  *,
  tolerance: float | None = None,  # of singular values that count as 1
) -> tuple[models.Params, Gauges]:
  """Brings the parameters of a model to their canonical form.

  It fixes the residual gauge, folds the scales of RMSNorms, writes shortcuts as
  `I - B B^T + C C^T`, moves the value biases into the output biases, and fixes the
  gauges of attention heads. The function of the model does not change. Structured
  leaves are materialized first. A sliced model must not get narrower from segment to
  segment. The tolerance is 0.8 roundoffs of the dtype of the shortcuts by default, as
  in `passes.remove_residual_gauge`.

  Returns the parameters, float32, in the stacks of the input, and the gauges. In B and
  C, columns that are not needed are zero and come last; `Model.layer` cuts them.
  """
  keys = [models.names.stack(layers) for layers in models.names.stacks(params)]
  stacks = {key: _widened(params[key]) for key in keys}
  outer = _widened({key: x for key, x in params.items() if key not in stacks})
  valid, gauges = models.layout.symmetries(config), Gauges(None, {}, {}, {})
  if tolerance is None:
    like = params[keys[0]].get('attention_shortcut', {'kernel': jnp.float32(0)})
    roundoff = max(float(jnp.finfo(like['kernel'].dtype).eps) / 2, 2.0**-19)
    tolerance = rotations.TOLERANCE * roundoff
  if valid.segments or valid.stream:
    stacks, outer, gauges = _rotated(stacks, outer, config, tolerance)
  for key, stack in stacks.items():
    fix = functools.partial(layer_lib.fix, config=config)
    stacks[key], gauges.heads[key] = jax.vmap(fix)(stack)
  result = {key: structured.unflatten(stack) for key, stack in stacks.items()}
  return structured.unflatten(outer) | result, gauges


def _widened(params: models.Params) -> Params:
  """Returns float32 arrays by path."""
  arrays = structured.flatten(jax.tree.map(jnp.asarray, params))
  return structured.expand(structured.astype(arrays, jnp.float32))


def _rotated(
  stacks: dict[str, Params], outer: Params, config: models.ModelConfig, tolerance: float
) -> tuple[dict[str, Params], Params, Gauges]:
  """Rotates the segments of a sliced model, or the stream of a dense one."""
  widths = config.segment_widths
  if any(after < before for before, after in itertools.pairwise(widths)):
    text = f'canonicalize takes segments that do not get narrower, got {widths}'
    raise ValueError(f'{text}; passes.remove_residual_gauge takes any widths')
  gauge: Callable[[Params], Any] = jax.vmap(
    functools.partial(layer_lib.gauge, config=config)
  )
  # No shortcut narrows the stream, so none is None.
  polars: dict[str, list[canonical.Polar]] = {
    key: gauge(stack) for key, stack in stacks.items()
  }
  first_key, *_, last_key = *stacks, *stacks
  first_layer, first_polars = _layer((stacks[first_key], polars[first_key]), 0)
  first = layer_lib.first_rotation(first_layer, first_polars, config)
  rotation = jnp.eye(widths[0], dtype=jnp.float32) if first is None else first.rotation
  last_polars = _layer(polars[last_key], -1) or [None]  # none in a dense model
  free = layer_lib.last_rotation(outer, last_polars[-1])
  gauges = Gauges(rotation, {}, {}, {})

  def rotate_layer(
    params: Params, read: jax.Array, polars: list[canonical.Polar], z: jax.Array | None
  ) -> tuple[Params, list[jax.Array]]:
    segments = layer_lib.segments(params, polars, read, config, free=z)
    names = layer_lib.shortcut_paths(config)
    kernels = {path: leaf for path, leaf in params.items() if path not in names}
    rotated = layer_lib.rotate(kernels, segments, config)
    for rows, polar, path in zip(segments, polars, names, strict=False):
      rotated[path] = rotations.shortcut(
        rows, polar, tolerance=tolerance, columns=(len(polar.u),) * 2
      )
    return rotated, segments[1:]

  for key, stack in stacks.items():
    z = free.rotation if free is not None and key == last_key else None
    rotate = functools.partial(rotate_layer, z=z)
    if not config.sliced:
      stacks[key], _ = jax.vmap(rotate, (0, None, 0))(stack, rotation, [])
      continue
    read, steps = rotation[None], [polar.rotation for polar in polars[key]]
    if len(steps[0]) > 1:  # only a stack of one layer can get wider
      whole = functools.reduce(jax.vmap(products.matmul), steps)
      after = rotations.running_rotations(whole, rotation)
      read = jnp.concatenate([read, after[:-1]])
    stacks[key], written = jax.vmap(rotate)(stack, read, polars[key])
    gauges.segments[key] = tuple(written)
    gauges.singular_values[key] = tuple(polar.values for polar in polars[key])
    rotation = written[-1][-1]
  outer = layer_lib.rotate(outer, [gauges.first, rotation], config, is_outer=True)
  if first is not None:
    kernel = stacks[first_key][layer_lib.UP]
    upper = rotations.upper_rows(kernel[0], first).materialize()
    stacks[first_key][layer_lib.UP] = kernel.at[0].set(upper)
  if free is not None:
    outer[layer_lib.HEAD] = rotations.upper_rows(outer[layer_lib.HEAD], free)
  return stacks, outer, gauges


def _layer(stack: Any, index: int) -> Any:
  """Returns one layer of a stack of arrays."""
  return jax.tree.map(lambda x: x[index], stack)
