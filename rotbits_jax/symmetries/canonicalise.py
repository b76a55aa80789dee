r"""Canonical weights of a whole model in one call, its layers stacked.

    jax.jit(canonicalise, static_argnums=1)(params, config)

The layers are stacked `[N, ...]`, so there is no loop over layers. Per segment of the
residual stream, and independent of the others, the polar decompositions of the
shortcuts give O_s and P_s. The rotations are the running product R_{s+1} = O_s^T R_s,
an associative scan over the layers. Then all kernels are multiplied by their rotations,
again independent of each other. Nothing waits for the host: choices of a rank that
depend on numbers are masks. If the layer axis is sharded over devices, only the scan
communicates.

`passes` makes the same canonical form a few layers at a time, rounds it to the dtype of
the source, and cuts what is masked. Shape letters are those of `models.config`.
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

Params = dict[str, Any]
_UP, _HEAD = 'mlp/up/kernel', 'head/kernel'


class Gauges(NamedTuple):
  """The coordinates that `canonicalise` chose, float32.

  The keys of the dicts are those of the stacks, like 'layers.0:16'. A dict is empty if
  the model has no such symmetry.

  Attributes:
    first: R_0, `[d, d]`, the rotation of the embedding; the rotation of all segments of
      a dense model. None if no segment is rotated.
    segments: R of the segments that the sublayers of a sliced model write, `[N, e, e]`
      for each sublayer.
    singular_values: those of the shortcuts, `[N, d]` for each sublayer, descending.
    values: A with `W_v -> W_v A`, `W_o -> A^-1 W_o`, `[N, K, h, h]`.
    keys: A with `W_q -> W_q A`, `W_k -> W_k A^-T` in the m coordinates of a head that
      RoPE does not rotate, `[N, K, m, m]`.
  """

  first: jax.Array | None
  segments: dict[str, tuple[jax.Array, ...]]
  singular_values: dict[str, tuple[jax.Array, ...]]
  values: dict[str, jax.Array]
  keys: dict[str, jax.Array]


def canonicalise(
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
  layers = {key: models.names.stacked_layers(key) for key in params}
  keys = sorted((x.start, key) for key, x in layers.items() if x is not None)
  stacks = {key: _arrays(structured.flatten(params[key])) for _, key in keys}
  outer = structured.flatten({k: x for k, x in params.items() if k not in stacks})
  outer = _arrays(outer)
  gauges = Gauges(None, {}, {}, {}, {})
  if valid.segments:
    dtype = params[keys[0][1]]['attention_shortcut']['kernel'].dtype
    unit = max(
      float(jnp.finfo(dtype).eps) / 2, 2.0**-19
    )  # as `passes.Context.roundoff`
    tolerance = 0.7 * unit if tolerance is None else tolerance
    gauges = _rotate_segments(outer, stacks, config, tolerance, max_rank)
  elif valid.stream:
    gauges = gauges._replace(first=_rotate_stream(outer, stacks, config))
  for key, stack in stacks.items():
    if valid.values and all(x in stack for x in (_OUT_BIAS, _VALUE_BIAS)):
      _remove_value_bias(stack, config)
    if valid.key_bias and _is_array(stack, _KEY_BIAS):
      stack[_KEY_BIAS] = _constant(stack[_KEY_BIAS], 0.0)
    for names, found, is_valid in (
      (heads.VALUES, gauges.values, valid.values),
      (heads.KEYS, gauges.keys, valid.queries and config.rotary_dim < config.head_dim),
    ):
      if is_valid and (gauge := _fix_heads(stack, names, config)) is not None:
        found[key] = gauge
  result = structured.unflatten(outer)
  result |= {key: structured.unflatten(stack) for key, stack in stacks.items()}
  return {key: result[key] for key in params}, gauges


def _arrays(params: Params) -> Params:
  wide = structured.astype(params, jnp.float32)
  wide = {
    path: leaf if structured.is_structured(leaf) else jnp.asarray(leaf)
    for path, leaf in wide.items()
  }
  return structured.expand(wide, keep_factors=True)


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
      'canonicalise takes segments that do not get narrower, got '
      f'{config.segment_widths=}; passes.remove_residual_gauge takes any widths'
    )
  sublayers = models.layout.SUBLAYERS[: config.segments_per_layer]
  names = [f'{sublayer}_shortcut/kernel' for sublayer in sublayers]
  axes = models.layout.layer_axes(config)
  polars = {key: _polars([stack[x] for x in names]) for key, stack in stacks.items()}
  first_stack, last_stack = next(iter(stacks)), list(stacks)[-1]
  new = widths[-1] - widths[-2]  # dimensions of the last segment
  first = jnp.eye(widths[0], dtype=jnp.float32)
  kernel = stacks[first_stack][_UP]
  has_upper = config.parallel_block or widths[0] == widths[1]
  has_upper &= not structured.is_structured(kernel)
  if has_upper:
    before = polars[first_stack][0].rotation[0]
    kernel = kernel[0] if config.parallel_block else products.matmul(before, kernel[0])
    first = rotations.upper_rotation(kernel)
  gauges = Gauges(first, {}, {}, {}, {})
  rotation = first
  for key, stack in stacks.items():
    free, steps = None, [polar.rotation for polar in polars[key]]
    if key == last_stack and new and _is_array(outer, _HEAD):
      rows = products.matmul(steps[-1][0, -new:], outer[_HEAD][:, :new])
      free = rotations.upper_rotation(rows)
    found = _walk(steps, rotation, free)
    rotation = found[-1][-1]
    kernels = {x: stack.pop(x) for x in names}
    turn = functools.partial(rotations.rotate_parameters, axes=axes)
    stack |= jax.vmap(turn)(stack, tuple(found))
    for s, name in enumerate(names):
      count = kernels[name].shape[1] if max_rank is None else max_rank
      count = min(count, kernels[name].shape[1])
      factor = functools.partial(
        shortcuts.factors, tolerance=tolerance, columns=(count, count)
      )
      b, c = jax.vmap(factor)(found[s], polars[key][s])
      columns = kernels[name].shape[2]
      stack[name] = structured.IdentityMinusGram(b, c, columns=columns)
    gauges.segments[key] = tuple(found[1:])
    gauges.singular_values[key] = tuple(polar.values for polar in polars[key])
  ends = rotations.rotate_parameters(
    outer, (first, rotation), models.layout.outer_axes(config)
  )
  outer |= ends
  if has_upper:
    up = stacks[first_stack][_UP]
    stacks[first_stack][_UP] = up.at[0].set(jnp.triu(up[0]))
  if new and _is_array(outer, _HEAD):
    upper = jnp.concatenate([outer[_HEAD][:-new], jnp.triu(outer[_HEAD][-new:])])
    outer[_HEAD] = structured.TrapezoidalRows.of(upper, new)
  return gauges


def _polars(kernels: list[jax.Array]) -> list[canonical.Polar]:
  """Returns the polar decompositions of the shortcuts of all layers, by sublayer."""
  if len({kernel.shape for kernel in kernels}) > 1:
    return [jax.vmap(canonical.polar)(kernel) for kernel in kernels]
  both = jax.vmap(jax.vmap(canonical.polar))(jnp.stack(kernels, axis=1))
  split = lambda s: jax.tree.map(lambda x: x[:, s], both)
  return [split(s) for s in range(len(kernels))]


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
  given = first[None]
  if len(steps[0]) > 1:
    whole = steps[0] if len(steps) == 1 else jax.vmap(products.matmul)(*steps)
    written = rotations.running_rotations(whole, first)
    given = jnp.concatenate([given, written[:-1]])
  found = [given]
  for step in steps:
    is_last = len(found) == len(steps)
    if is_last and len(step) > 1:
      found.append(written)
      continue
    turn = functools.partial(rotations.next_rotation, free=free if is_last else None)
    found.append(jax.vmap(turn)(step, found[-1]))
  return found


def _rotate_stream(
  outer: Params, stacks: dict[str, Params], config: models.ModelConfig
) -> jax.Array | None:
  """Folds the norms of a dense model and rotates its stream, in place."""
  layer_axes, outer_axes = (
    models.layout.layer_axes(config),
    models.layout.outer_axes(config),
  )
  fold = functools.partial(norms.fold_norm_scales, config=config, axes=layer_axes)
  for stack in stacks.values():
    stack |= jax.vmap(fold)(stack)
  outer |= norms.fold_norm_scales(outer, config, outer_axes)
  first_stack = next(iter(stacks.values()))
  rotation = None
  if not structured.is_structured(first_stack[_UP]):
    rotation = rotations.upper_rotation(first_stack[_UP][0])
  turn = functools.partial(
    rotations.rotate_parameters, rotations=(rotation,) * 3, axes=layer_axes
  )
  for stack in stacks.values():
    stack |= jax.vmap(turn)(stack)
    stack |= {p: _constant(x, 1.0) for p, x in stack.items() if p.endswith(_SCALE)}
  outer |= rotations.rotate_parameters(outer, (rotation,) * 2, outer_axes)
  final = f'final{_SCALE}'
  outer[final] = structured.Constant(jnp.float32(1), outer[final].shape)
  if rotation is not None:
    up = first_stack[_UP]
    first_stack[_UP] = up.at[0].set(jnp.triu(up[0]))
  return rotation


# ---- heads -------------------------------------------------------------------------

_OUT_BIAS, _VALUE_BIAS, _KEY_BIAS = (
  f'attention/{name}/bias' for name in ('out', 'value', 'key')
)
_SCALE = '_norm/scale'


def _constant(stacked: jax.Array, value: float) -> structured.Constant:
  values = jnp.full(len(stacked), value, jnp.float32)
  return structured.Constant(values, stacked.shape[1:])


def _remove_value_bias(stack: Params, config: models.ModelConfig) -> None:
  kernel = structured.materialize(stack['attention/out/kernel'])
  move = functools.partial(biases.with_value_bias, kv_heads=config.num_kv_heads)
  stack[_OUT_BIAS] = jax.vmap(move)(stack[_OUT_BIAS], stack[_VALUE_BIAS], kernel)
  stack[_VALUE_BIAS] = _constant(stack[_VALUE_BIAS], 0.0)


def _fix_heads(
  stack: Params, names: tuple[str, ...], config: models.ModelConfig
) -> jax.Array | None:
  """Fixes the gauge of heads, in place; returns it, or None for low-rank kernels."""
  pair = {
    path: stack[path]
    for path in names
    if path in stack and not isinstance(stack[path], structured.Constant)
  }
  kernels = [x for path, x in pair.items() if path.endswith('/kernel')]
  if any(map(structured.is_structured, kernels)):
    return None
  if min(min(kernel.shape[1:]) for kernel in kernels) < config.head_dim:
    return None
  settings: dict[str, Any] = {'kv_heads': config.num_kv_heads}
  if names is heads.KEYS:
    settings['rotary'] = config.rotary_dim
  fix = heads.fix_keys if names is heads.KEYS else heads.fix_values
  fixed = jax.vmap(functools.partial(fix, **settings))(pair)
  stack |= fixed.params
  return fixed.gauge
