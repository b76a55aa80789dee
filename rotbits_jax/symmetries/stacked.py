r"""Canonical weights of a whole model in one call, its layers stacked.

    jax.jit(canonicalize, static_argnums=1)(params, config)

The layers are stacked `[N, ...]`, so there is no loop over layers. Per segment of the
residual stream, and independent of the others, the polar decompositions of the
shortcuts give O_s and P_s. The rotations are the running product R_{s+1} = O_s^T R_s,
an associative scan over the layers. Then all kernels are multiplied by their rotations,
again independent of each other. Nothing waits for the host: choices of a rank that
depend on numbers are masks. If the layer axis is sharded over devices, only the scan
communicates.

`passes` makes the same canonical form a few layers at a time, rounds it to the dtype of
the source, and cuts masked columns. Shape letters are those of `models.config`.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import biases
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations
from rotbits_jax.symmetries import shortcuts

Params = dict[str, Any]  # leaves by path
_HEAD = 'head/kernel'


class Gauges(NamedTuple):
  """The coordinates that `canonicalize` chose, float32.

  The keys of the dicts are those of the stacks, like 'layers.0:16'.

  Attributes:
    first: R_0, `[d, d]`, the rotation of the embedding; the rotation of all segments of
      a dense model. None if no segment is rotated.
    segments: R of the segments that the sublayers of a sliced model write, `[N, e, e]`
      for each sublayer.
    singular_values: those of the shortcuts, `[N, d]` for each sublayer, descending.
    heads: 'values' is A with `W_v -> W_v A`, `W_o -> A^-1 W_o`, `[N, K, h, h]`. 'keys'
      is A with `W_q -> W_q A`, `W_k -> W_k A^-T` in the m coordinates of a head that
      RoPE rotates in no layer of the stack, `[N, K, m, m]`.
  """

  first: jax.Array | None
  segments: dict[str, tuple[jax.Array, ...]]
  singular_values: dict[str, tuple[jax.Array, ...]]
  heads: dict[str, dict[str, jax.Array]]


def canonicalize(
  params: models.Params,
  config: models.ModelConfig,
  *,
  tolerance: float | None = None,
  max_rank: int | None = None,
) -> tuple[models.Params, Gauges]:
  """Brings the parameters of a model to their canonical form.

  It fixes the residual gauge, folds the scales of RMSNorms, writes shortcuts as
  `I - B B^T + C C^T`, moves the value biases into the output biases, and fixes the
  gauges of attention heads. The function of the model does not change. A number that is
  not finite spreads to all parameters that depend on it.

  Args:
    params: the parameters of a model, see `models.Model`, in any floating-point dtype.
      Structured leaves are materialized first, except low-rank pairs.
    config: its config. The segments of a sliced model must not get narrower from one to
      the next.
    tolerance: a singular value of a shortcut counts as 1 if it differs from 1 by at
      most this. By default it is 0.7 roundoffs of the dtype of the shortcuts, as in
      `passes.remove_residual_gauge`.
    max_rank: number of columns of B and of C. With more values below 1, or above it,
      those closest to 1 count as 1, see `Gauges.singular_values`. By default it is d,
      so that nothing is left out.

  Returns:
    The parameters, float32, and the gauges. Their stacks are those of the input. In B
    and C, columns that are not needed are zero and come last; `Model.layer` cuts them.

  Raises:
    ValueError: if a segment is narrower than the one before it.
  """
  valid = models.layout.symmetries(config)
  ranges = {key: models.names.stacked_layers(key) for key in params}
  keys = sorted((x.start, key) for key, x in ranges.items() if x is not None)
  stacks = {key: _widened(params[key]) for _, key in keys}
  outer = _widened({key: x for key, x in params.items() if key not in stacks})
  gauges = Gauges(None, {}, {}, {})
  if valid.segments:
    dtype = params[keys[0][1]]['attention_shortcut']['kernel'].dtype
    unit = max(
      float(jnp.finfo(dtype).eps) / 2, 2.0**-19
    )  # as `passes.Context.roundoff`
    tolerance = 0.7 * unit if tolerance is None else tolerance
    gauges = _rotate_segments(outer, stacks, config, tolerance, max_rank)
  elif valid.stream:
    gauges = gauges._replace(first=_rotate_stream(outer, stacks, config))
  fix = functools.partial(_fix_heads, config=config, rotary=config.rotary_dim)
  for key, stack in stacks.items():
    stacks[key], gauges.heads[key] = jax.vmap(fix)(stack)
  result = {key: structured.unflatten(stack) for key, stack in stacks.items()}
  return structured.unflatten(outer) | result, gauges


def _widened(params: models.Params) -> Params:
  arrays = structured.flatten(jax.tree.map(jnp.asarray, params))
  return structured.expand(structured.astype(arrays, jnp.float32), keep_factors=True)


def _is_array(params: Params, path: str) -> bool:
  return path in params and not structured.is_structured(params[path])


# ---- the residual stream -----------------------------------------------------------


def _rotate_segments(
  outer: Params,
  stacks: dict[str, Params],
  config: models.ModelConfig,
  tolerance: float,
  max_rank: int | None,
) -> Gauges:
  """Rotates the segments of a sliced model, in place."""
  widths = config.segment_widths
  if any(e < d for d, e in itertools.pairwise(widths)):
    raise ValueError(
      'canonicalize takes segments that do not get narrower, got '
      f'{config.segment_widths=}; passes.remove_residual_gauge takes any widths'
    )
  polars = {key: _polars(stack, config) for key, stack in stacks.items()}
  (first_stack, *_), last_polars = stacks.values(), list(polars.values())[-1]
  path = models.layout.UPPER_KERNEL
  rotation, up = jnp.eye(widths[0], dtype=jnp.float32), first_stack[path]
  is_upper = _is_array(first_stack, path) and (
    config.parallel_block or widths[0] == widths[1]
  )
  if is_upper:
    step = next(iter(polars.values()))[0].rotation[0]
    kernel = up[0] if config.parallel_block else products.matmul(step, up[0])
    rotation = rotations.upper_rotation(kernel)
  gauges = Gauges(rotation, {}, {}, {})
  new, free = widths[-1] - widths[-2], None  # dimensions of the last segment
  if new and _is_array(outer, _HEAD):
    step = last_polars[-1].rotation[0, -new:]
    free = rotations.upper_rotation(products.matmul(step, outer[_HEAD][:, :new]))
  rotate = functools.partial(
    _rotate_layer, config=config, tolerance=tolerance, max_rank=max_rank
  )
  *_, last = stacks
  for key, stack in stacks.items():
    own = free if key == last else None
    found = _walk([x.rotation for x in polars[key]], rotation, own)
    stacks[key] = jax.vmap(rotate)(stack, found, polars[key])
    gauges.segments[key] = tuple(found[1:])
    gauges.singular_values[key] = tuple(polar.values for polar in polars[key])
    rotation = found[-1][-1]
  axes = models.layout.outer_axes(config)
  outer |= rotations.rotate_parameters(outer, (gauges.first, rotation), axes)
  if is_upper:
    _set_upper(stacks, path)
  if free is not None:
    upper = rotations.upper_rows(outer[_HEAD], new)
    outer[_HEAD] = structured.TrapezoidalRows.of(upper, new)
  return gauges


def _polars(stack: Params, config: models.ModelConfig) -> list[canonical.Polar]:
  """Returns the polar decompositions of the shortcuts of a stack, by sublayer."""
  kernels = [stack[path] for path in _shortcuts(config)]
  if len({kernel.shape for kernel in kernels}) > 1:
    return [jax.vmap(canonical.polar)(kernel) for kernel in kernels]
  # One after the other, because LAPACK uses all CPUs for each.
  both = jax.vmap(jax.vmap(canonical.polar))(jnp.stack(kernels, axis=1))
  of_sublayer = lambda s: jax.tree.map(lambda x: x[:, s], both)
  return [of_sublayer(s) for s in range(len(kernels))]


def _shortcuts(config: models.ModelConfig) -> list[str]:
  sublayers = models.layout.SUBLAYERS[: config.segments_per_layer]
  return [f'{sublayer}_shortcut/kernel' for sublayer in sublayers]


def _walk(
  steps: list[jax.Array], first: jax.Array, free: jax.Array | None
) -> list[jax.Array]:
  """Returns the rotations of the segments that the layers of a stack read and write.

  Args:
    steps: O of the shortcuts, `[N, e, e]` for each sublayer.
    first: the rotation of the segment that the stack reads, `[d, d]`.
    free: Z of the last shortcut, see `rotations.next_rotation`.

  Returns:
    `[N, e, e]` for each segment of a layer.
  """
  if len(steps[0]) == 1:  # only such a stack can get wider
    found = [first]
    for i, (step,) in enumerate(steps, 1):
      own = free if i == len(steps) else None
      found.append(rotations.next_rotation(step, found[-1], own))
    return [x[None] for x in found]
  whole = steps[0] if len(steps) == 1 else jax.vmap(products.matmul)(*steps)
  written = rotations.running_rotations(whole, first)
  read = jnp.concatenate([first[None], written[:-1]])
  between = [jax.vmap(rotations.next_rotation)(x, read) for x in steps[:-1]]
  return [read, *between, written]


def _rotate_layer(
  params: Params,
  found: list[jax.Array],
  polars: list[canonical.Polar],
  *,
  config: models.ModelConfig,
  tolerance: float,
  max_rank: int | None,
) -> Params:
  """Rotates one layer of a sliced model."""
  names, axes = _shortcuts(config), models.layout.layer_axes(config)
  others = {path: leaf for path, leaf in params.items() if path not in names}
  rotated = rotations.rotate_parameters(others, tuple(found), axes)
  for rotation, polar, name in zip(found, polars, names, strict=False):
    (d, width), most = params[name].shape, max_rank
    count = d if most is None else min(most, d)
    b, c = shortcuts.factors(
      rotation, polar, tolerance=tolerance, columns=(count, count)
    )
    rotated[name] = structured.IdentityMinusGram(b, c, columns=width)
  return rotated


def _rotate_stream(
  outer: Params, stacks: dict[str, Params], config: models.ModelConfig
) -> jax.Array | None:
  """Folds the norms of a dense model and rotates its stream, in place."""
  axes, outer_axes = models.layout.layer_axes(config), models.layout.outer_axes(config)
  fold = functools.partial(norms.fold_norm_scales, config=config, axes=axes)
  for key, stack in stacks.items():
    stacks[key] = jax.vmap(fold)(stack)
  first_stack, rotation = next(iter(stacks.values())), None
  path = models.layout.UPPER_KERNEL
  if _is_array(first_stack, path):
    rotation = rotations.upper_rotation(first_stack[path][0])

  def rotate(params: Params, axes: models.layout.Axes) -> Params:
    rotated = rotations.rotate_parameters(params, (rotation,) * 3, axes)
    return norms.with_constant_scales(rotated, axes)

  for key, stack in stacks.items():
    stacks[key] = jax.vmap(functools.partial(rotate, axes=axes))(stack)
  folded = norms.fold_norm_scales(outer, config, outer_axes)
  outer |= rotate(folded, outer_axes)
  if rotation is not None:
    _set_upper(stacks, path)
  return rotation


def _set_upper(stacks: dict[str, Params], path: str) -> None:
  """Sets the zeros of a kernel of the first layer, in place."""
  stack = next(iter(stacks.values()))
  stack[path] = stack[path].at[0].set(jnp.triu(stack[path][0]))


# ---- heads -------------------------------------------------------------------------


def _fix_heads(
  params: Params, *, config: models.ModelConfig, rotary: int
) -> tuple[Params, dict[str, jax.Array]]:
  """Removes biases and fixes the gauges of the heads of one layer."""
  valid, kv_heads = models.layout.symmetries(config), config.num_kv_heads
  out, value, key = (f'attention/{name}/bias' for name in ('out', 'value', 'key'))
  params, gauges = dict(params), {}
  if valid.values and _is_array(params, out) and _is_array(params, value):
    kernel = structured.materialize(params[heads.OUT])
    params[out] = biases.with_value_bias(
      params[out], params[value], kernel, kv_heads=kv_heads
    )
    params[value] = structured.Constant.like(params[value], 0.0)
  if valid.key_bias and _is_array(params, key):
    params[key] = structured.Constant.like(params[key], 0.0)
  for name, paths, kernel, is_valid in (
    ('values', heads.VALUES, heads.OUT, valid.values),
    ('keys', heads.KEYS, heads.KEY, valid.queries and rotary < config.head_dim),
  ):
    pair = {path: params[path] for path in paths if _is_array(params, path)}
    kernels = [path for path in paths if path.endswith('/kernel')]
    fits = is_valid and all(path in pair for path in kernels)
    if fits and min(pair[kernel].shape) >= config.head_dim:
      fix = functools.partial(heads.fix_keys, rotary=rotary)
      fixed = (heads.fix_values if name == 'values' else fix)(pair, kv_heads=kv_heads)
      params |= fixed.params
      gauges[name] = fixed.gauge
  return params, gauges
