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

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.models import meshes
from rotbits_jax.symmetries import factorizations
from rotbits_jax.symmetries import layer as layer_lib
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations
from rotbits_jax.symmetries.layer import Params

Stacks = dict[str, Params]
"""Stacked layers, float32, by stack as 'layers.0:16'."""


class Gauges(NamedTuple):
  """The coordinates that `canonicalize` chose, float32, by stack as 'layers.0:16'."""

  first: jax.Array | None  # R_0, [d, d]; None if no segment is rotated
  segments: dict[str, tuple[jax.Array, ...]]  # R that sublayers write, [N, e, e] each
  singular_values: dict[str, tuple[jax.Array, ...]]  # of shortcuts, [N, d] each
  heads: dict[str, dict[str, jax.Array]]  # A of 'values' and 'keys', [N, K, h, h]


class _Rotated(NamedTuple):
  """A model in rotated coordinates."""

  stacks: Stacks
  outer: Params  # the parameters outside the layers, by path
  gauges: Gauges


class _Ends(NamedTuple):
  """The rotations that no shortcut determines; None where there is none."""

  first: rotations.UpperForm | None  # R_0
  last: rotations.UpperForm | None  # Z of the last shortcut


@meshes.with_auto_axes
def canonicalize(
  params: models.Params,
  config: models.ModelConfig,
  *,
  tolerance: float | None = None,
) -> tuple[models.Params, Gauges]:
  """Brings the parameters of a model to their canonical form.

  It fixes the residual gauge, folds the scales of RMSNorms, writes shortcuts as
  `I - B B^T + C C^T`, moves the value biases into the output biases, and fixes the
  gauges of attention heads. The function of the model does not change. Structured
  leaves are materialized first.

  Args:
    params: the parameters, see `models.Model`, in any floating-point dtype.
    config: the config of the model. The segments of a sliced model must not get
      narrower.
    tolerance: how far singular values that count as 1 may be from 1. By default, it is
      0.8 roundoffs of the dtype of the shortcuts, as in `passes.remove_residual_gauge`.

  Returns:
    The parameters, float32, in the stacks of the input; and the gauges. In B and C,
    columns that are not needed are zero and come last; `Model.layer` cuts them.

  Raises:
    ValueError: if a parameter is missing, is not one of the model, or has another
      shape, with its path; if segments get narrower; or if the shortcuts of a sliced
      model are differentiated. Singular values of 1 repeat in every shortcut, so that
      their vectors, and the columns of B, have no derivatives.
  """
  models.layout.check_params(params, config)
  keys = [models.names.stack(layers) for layers in models.names.stacks(params)]
  stacks = {key: _widened(params[key]) for key in keys}
  outer = _widened({key: x for key, x in params.items() if key not in stacks})
  if tolerance is None:
    tolerance = _default_tolerance(params[keys[0]])
  valid = models.layout.symmetries(config)
  gauges = Gauges(None, {}, {}, {})
  if valid.segments:
    stacks, outer, gauges = _rotate_sliced(stacks, outer, config, tolerance)
  elif valid.stream:
    stacks, outer, gauges = _rotate_dense(stacks, outer, config)
  for key, stack in stacks.items():
    fix = functools.partial(layer_lib.fix, config=config)
    stacks[key], gauges.heads[key] = jax.vmap(fix)(stack)
  result = {key: structured.unflatten(stack) for key, stack in stacks.items()}
  return structured.unflatten(outer) | result, gauges


def _widened(params: models.Params) -> Params:
  """Returns float32 arrays by path."""
  arrays = structured.flatten(jax.tree.map(jnp.asarray, params))
  return structured.expand(structured.astype(arrays, jnp.float32))


def _default_tolerance(stack: models.Params) -> float:
  """Returns 0.8 roundoffs of the dtype of the shortcuts of a stack."""
  like = stack.get('attention_shortcut', {'kernel': jnp.float32(0)})
  roundoff = float(jnp.finfo(like['kernel'].dtype).eps) / 2
  return rotations.TOLERANCE * max(roundoff, 2.0**-19)


def _rotate_dense(
  stacks: Stacks, outer: Params, config: models.ModelConfig
) -> _Rotated:
  """Rotates the residual stream of a dense model: all segments by R_0."""
  first_layer = _layer(next(iter(stacks.values())), 0)
  ends = _Ends(layer_lib.first_rotation(first_layer, [], config), None)
  rotation = _first(ends, config)
  segments = [rotation] * 3

  def rotate(params: Params) -> Params:
    return layer_lib.rotate(params, segments, config)

  rotated = {key: jax.vmap(rotate)(stack) for key, stack in stacks.items()}
  outer = layer_lib.rotate(outer, [rotation, rotation], config, is_outer=True)
  gauges = Gauges(rotation, {}, {}, {})
  return _with_ends(_Rotated(rotated, outer, gauges), ends)


def _rotate_sliced(
  stacks: Stacks, outer: Params, config: models.ModelConfig, tolerance: float
) -> _Rotated:
  """Rotates the segments of a sliced model: R_{s+1} = O_s^T diag(R_s, Z)."""
  _check_widths(config.segment_widths)
  # No shortcut narrows the stream, so none is None.
  gauge: Any = functools.partial(layer_lib.gauge, config=config)
  polars: dict[str, list[factorizations.Polar]] = {
    key: jax.vmap(gauge)(stack) for key, stack in stacks.items()
  }
  ends = _ends(stacks, polars, outer, config)
  rotation = _first(ends, config)
  gauges = Gauges(rotation, {}, {}, {})
  rotated: Stacks = {}
  for key, stack in stacks.items():
    rotate = functools.partial(
      _rotate_layer,
      config=config,
      tolerance=tolerance,
      free=ends.last.rotation if ends.last and key == [*stacks][-1] else None,
    )
    read = _running(polars[key], rotation)
    rotated[key], written = jax.vmap(rotate)(stack, polars[key], read)
    gauges.segments[key] = tuple(written)
    gauges.singular_values[key] = tuple(polar.values for polar in polars[key])
    rotation = written[-1][-1]
  outer = layer_lib.rotate(outer, [gauges.first, rotation], config, is_outer=True)
  return _with_ends(_Rotated(rotated, outer, gauges), ends)


def _check_widths(widths: tuple[int, ...]) -> None:
  """Raises a ValueError if segments get narrower."""
  if any(after < before for before, after in itertools.pairwise(widths)):
    raise ValueError(
      f'canonicalize takes segments that do not get narrower, got {widths}; '
      'passes.remove_residual_gauge takes any widths'
    )


def _ends(
  stacks: Stacks,
  polars: dict[str, list[factorizations.Polar]],
  outer: Params,
  config: models.ModelConfig,
) -> _Ends:
  """Chooses R_0 by the first layer, and Z by the head."""
  first_key, *_, last_key = *stacks, *stacks
  first_layer, first_polars = _layer((stacks[first_key], polars[first_key]), 0)
  last_polars = _layer(polars[last_key], -1)
  return _Ends(
    layer_lib.first_rotation(first_layer, first_polars, config),
    layer_lib.last_rotation(outer, last_polars[-1]),
  )


def _first(ends: _Ends, config: models.ModelConfig) -> jax.Array:
  """Returns R_0, the identity if nothing determines it."""
  if ends.first is None:
    return jnp.eye(config.segment_widths[0], dtype=jnp.float32)
  return ends.first.rotation


def _running(polars: list[factorizations.Polar], rotation: jax.Array) -> jax.Array:
  """Returns the rotations of the segments that the layers of a stack read: `[N, d, d]`.

  The first one is given. The others are running products, by an associative scan.
  """
  steps = [polar.rotation for polar in polars]
  if len(steps[0]) == 1:  # only a stack of one layer can get wider
    return rotation[None]
  whole = functools.reduce(jax.vmap(products.matmul), steps)
  after = rotations.running_rotations(whole, rotation)
  return jnp.concatenate([rotation[None], after[:-1]])


def _rotate_layer(
  params: Params,
  polars: list[factorizations.Polar],
  read: jax.Array,
  *,
  config: models.ModelConfig,
  tolerance: float,
  free: jax.Array | None,
) -> tuple[Params, list[jax.Array]]:
  """Rotates a layer of a sliced model; also returns the rotations that it writes."""
  segments = layer_lib.segments(params, polars, read, config, free=free)
  names = layer_lib.shortcut_paths(config)
  kernels = {path: leaf for path, leaf in params.items() if path not in names}
  rotated = layer_lib.rotate(kernels, segments, config)
  for rows, polar, path in zip(segments, polars, names, strict=False):
    columns = (len(polar.u),) * 2
    rotated[path] = rotations.shortcut(
      rows, polar, tolerance=tolerance, columns=columns
    )
  return rotated, segments[1:]


def _with_ends(model: _Rotated, ends: _Ends) -> _Rotated:
  """Writes exact zeros where R_0 and Z made kernels trapezoidal."""
  if ends.first is not None:
    stack = next(iter(model.stacks.values()))
    kernel = stack[layer_lib.UP]
    upper = rotations.upper_rows(kernel[0], ends.first).materialize()
    stack[layer_lib.UP] = kernel.at[0].set(upper)
  if ends.last is not None:
    head = model.outer[layer_lib.HEAD]
    model.outer[layer_lib.HEAD] = rotations.upper_rows(head, ends.last)
  return model


def _layer(stack: Any, index: int) -> Any:
  """Returns one layer of a stack of arrays."""
  return jax.tree.map(lambda x: x[index], stack)
