r"""Scales of MLP neurons, by powers of two: no bit of any mantissa changes.

A neuron that is linear in what `up` computes, because it is gated or a ReLU, can be
scaled between the two kernels:

    down(act(gate(x)) * up(x)),  down(relu(up(x))):
    up_j -> 2^e_j up_j,  up's bias_j -> 2^e_j bias_j,  down_j -> 2^-e_j down_j

Exponents cost fewest bits where all numbers of a kernel have one scale. With u_j and
d_j the logarithms of the root mean squares of up's column and down's row, less their
medians over the neurons, `(u_j + e_j)^2 + (d_j - e_j)^2` is least for
`e_j = (d_j - u_j) / 2`. Of the integers that keep every bit, the one nearest to that is
taken; 0 is one of them. Neurons of the trained models measured differ by 0.07 to 0.17
octaves (standard deviations), so that hardly any is scaled and next to nothing saved.

A number x keeps its bits if rounding it to the storage format and multiplying it by 2^e
can change places, as they can where x and 2^e x are normal numbers of the format.
Integers decide that, from the bits of the float32.

Shape letters: D width of what the MLP reads, E of what it writes, F neurons.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import transform

_MOST = 126  # 2^-126 is the least normal float32; smaller products may become 0


class Exponents(NamedTuple):
  """From which to which power of two all numbers of a neuron keep their bits."""

  least: jax.Array  # int32
  greatest: jax.Array  # int32


def exact_exponents(numbers: jax.Array, form: Any) -> Exponents:
  """The e for which `round(2^e x) == 2^e round(x)` is sure for all numbers x.

  Args:
    numbers: `[n]`, exact in float32.
    form: the format that they will be rounded to.

  Returns:
    Scalars, between -126 and 126, with 0 between them; both 0 if a number is infinite
    or NaN.
  """
  info = jnp.finfo(form)
  bits = jax.lax.bitcast_convert_type(numbers.astype(jnp.float32), jnp.int32)
  biased, mantissa = bits >> 23 & 0xFF, bits & 0x7FFFFF
  exponent = biased - 127
  # The place of the last bit that is set: mantissa & -mantissa has only that.
  significand = mantissa | 0x800000
  last = exponent + 8 - jax.lax.clz(significand & -significand)
  first_place = max(int(np.log2(float(info.smallest_subnormal))), -_MOST)
  least_normal = int(info.minexp)
  exact = last >= jnp.maximum(exponent - info.nmant, first_place)
  # A number that is not exact may be rounded up to the next power of two.
  least = jnp.where(exact, first_place - last, least_normal - exponent)
  greatest = info.maxexp - 1 - jnp.where(exact, exponent, exponent + 1)
  fixed = (biased == 0) | (biased == 0xFF) | (greatest < 0)
  fixed |= ~exact & (exponent < least_normal)
  zero = (biased == 0) & (mantissa == 0)
  least = jnp.where(zero, -_MOST, jnp.where(fixed, 0, least))
  greatest = jnp.where(zero, _MOST, jnp.where(fixed, 0, greatest))
  return Exponents(
    jnp.clip(jnp.max(least), -_MOST, 0), jnp.clip(jnp.min(greatest), 0, _MOST)
  )


def log_scales(kernel: jax.Array, axis: int) -> jax.Array:
  """Logarithms to base 2 of root mean squares along an axis, less their median.

  Args:
    kernel: `[n, F]` or `[F, n]`.
    axis: that of the n.

  Returns:
    float32 `[F]`; not finite for neurons of zeros or of non-finite numbers, which the
    median leaves out.
  """
  kernel = kernel.astype(jnp.float32)
  scales = jnp.log2(jnp.mean(jnp.square(kernel), axis=axis)) / 2
  return scales - jnp.nanmedian(jnp.where(jnp.isfinite(scales), scales, jnp.nan))


def neuron_exponents(mlp: models.Params, form: Any) -> jax.Array:
  """The e_j of an MLP.

  Args:
    mlp: 'up' and 'down' with kernels `[D, F]` and `[F, E]` and up's bias `[F]`, if any.
    form: the format that its numbers will be rounded to.

  Returns:
    int32 `[F]`.
  """
  up, down = mlp['up']['kernel'], mlp['down']['kernel']
  exact = functools.partial(exact_exponents, form=form)
  read, written = jax.vmap(exact, in_axes=1)(up), jax.vmap(exact)(down)
  least = jnp.maximum(read.least, -written.greatest)
  greatest = jnp.minimum(read.greatest, -written.least)
  if 'bias' in mlp['up']:
    bias = jax.vmap(exact)(mlp['up']['bias'][:, None])
    least = jnp.maximum(least, bias.least)
    greatest = jnp.minimum(greatest, bias.greatest)
  wanted = (log_scales(down, axis=1) - log_scales(up, axis=0)) / 2
  nearest = jnp.round(jnp.where(jnp.isfinite(wanted), wanted, 0)).astype(jnp.int32)
  return jnp.clip(nearest, least, greatest)


def scale_mlp(mlp: models.Params, exponents: jax.Array) -> models.Params:
  """Scales the neurons of an MLP by powers of two.

  Args:
    mlp: see `neuron_exponents`; what else it holds stays.
    exponents: int32 `[F]`, between -126 and 126.

  Returns:
    The parameters, in the dtypes they had.
  """
  scaled = lambda x, powers: (x.astype(jnp.float32) * powers).astype(x.dtype)
  up = {name: scaled(x, _power_of_two(exponents)) for name, x in mlp['up'].items()}
  kernel = scaled(mlp['down']['kernel'], _power_of_two(-exponents)[:, None])
  return mlp | {'up': up, 'down': mlp['down'] | {'kernel': kernel}}


def _power_of_two(exponents: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(exponents + 127 << 23, jnp.float32)


def scale_neurons() -> transform.Transform:
  """The transform that makes the scales of MLP neurons more alike.

  It changes no number of a model whose MLPs are neither gated nor ReLUs. Best at the
  start of a chain: of numbers as they are stored, the small ones of float16 can be
  scaled too, and of others only those that stay normal.

  Returns:
    A transform. Its notes tell, for each layer, how many neurons were scaled, and the
    spread of up's and down's scales before and after: standard deviations, in octaves.
  """
  return transform.Transform('neuron scales', _scale_neurons)


def _scale_neurons(
  model: models.Model,
) -> tuple[models.Model, list[transform.Note]]:
  if not model.config.gated_mlp and model.config.activation != 'relu':
    return model, []
  form = transform.storage_format(model)
  params, notes = dict(model.params), []
  layer = 0
  for group, size in enumerate(model.group_sizes):
    block = params[f'blocks_{group}']
    if _is_plain(block['mlp']):
      mlp = {name: block['mlp'][name] for name in ('up', 'down')}
      scaled = jax.device_get(_scale_layers(mlp, form=form))
      params[f'blocks_{group}'] = block | {'mlp': block['mlp'] | scaled.mlp}
      kernel = scaled.mlp['up']['kernel'][0]
      notes += [
        transform.note(f'layers.{layer + i}/mlp/up/kernel', kernel)
        | {
          'scaled': int(np.count_nonzero(scaled.exponents[i])),
          'spread': [transform.three_digits(x) for x in scaled.spread[i]],
        }
        for i in range(size)
      ]
    layer += size
  return dataclasses.replace(model, params=params), notes


def _is_plain(mlp: models.Params) -> bool:
  """Whether all that would be scaled are arrays of floating-point numbers."""
  return all(map(structured.is_plain, [*mlp['up'].values(), mlp['down']['kernel']]))


class _Scaled(NamedTuple):
  mlp: models.Params
  exponents: jax.Array  # int32 [F]
  spread: jax.Array  # [2]: before and after, root mean square over up and down


@functools.partial(jax.jit, static_argnames='form')
def _scale_layers(mlp: models.Params, *, form: Any) -> _Scaled:
  def scale(mlp: models.Params) -> _Scaled:
    exponents = neuron_exponents(mlp, form)
    scaled = scale_mlp(mlp, exponents)
    return _Scaled(scaled, exponents, jnp.stack([_spread(mlp), _spread(scaled)]))

  return jax.vmap(scale)(mlp)


def _spread(mlp: models.Params) -> jax.Array:
  """How far neurons' scales are from their median, in octaves."""
  scales = [
    log_scales(mlp['up']['kernel'], axis=0),
    log_scales(mlp['down']['kernel'], axis=1),
  ]
  square = jnp.square(jnp.stack(scales))
  finite = jnp.isfinite(square)
  count = jnp.maximum(jnp.sum(finite), 1)
  return jnp.sqrt(jnp.sum(square, where=finite) / count)
