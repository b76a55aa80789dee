"""Powers of two between an MLP's kernels: no bit of a mantissa changes."""

import dataclasses
import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import neurons

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FORMATS = (np.float16, ml_dtypes.bfloat16, np.float32)

_exact_exponents = jax.jit(neurons.exact_exponents, static_argnames='form')
_exact_exponents_of_rows = jax.jit(
  jax.vmap(neurons.exact_exponents, in_axes=(0, None)), static_argnums=1
)
_scale_layers = jax.jit(jax.vmap(neurons.scale_mlp))
_logits = jax.jit(models.logits)


@functools.cache
def _model(name):
  return checkpoints.load_checkpoint(TESTDATA / name).model


def _keeps_bits(x, exponent, form):
  """Whether `round(2^e x) == 2^e round(x)`, in float64; x is float32."""
  with np.errstate(over='ignore'):
    scaled = np.ldexp(np.float64(x), exponent).astype(np.float32).astype(form)
    rounded = np.float32(x).astype(form)
  return np.float64(scaled) == np.ldexp(np.float64(rounded), exponent)


def _numbers(form, exact):
  """float32 `[n]` over all magnitudes of a format, in it or between its numbers."""
  rng = np.random.default_rng(0)
  info = jnp.finfo(form)
  lowest = max(int(np.log2(float(info.smallest_subnormal))), -126)
  exponents = np.repeat(np.arange(lowest, info.maxexp), 8)
  numbers = np.ldexp(rng.uniform(1, 2, exponents.size), exponents)
  numbers = (numbers * rng.choice([-1, 1], exponents.size)).astype(np.float32)
  if exact:
    numbers = numbers.astype(form).astype(np.float32)
  return numbers[np.isfinite(numbers)]


def _perturbed(model, seed=0):
  """A model of the same function whose neurons differ by whole octaves."""
  rng = np.random.default_rng(seed)
  params = dict(model.params)
  for name, block in params.items():
    if name.startswith('blocks_'):
      kernel = block['mlp']['up']['kernel']
      octaves = rng.integers(-3, 4, (kernel.shape[0], kernel.shape[2]))
      scaled = jax.device_get(_scale_layers(block['mlp'], octaves.astype(np.int32)))
      params[name] = block | {'mlp': scaled}
  return dataclasses.replace(model, params=params)


class ExactExponentsTest(parameterized.TestCase):
  @parameterized.product(form=FORMATS, exact=(True, False))
  def test_every_exponent_of_the_range_keeps_every_bit(self, form, exact):
    numbers = _numbers(form, exact)
    least, greatest = _exact_exponents_of_rows(numbers[:, None], form)
    chex.assert_type([least, greatest], jnp.int32)
    for x, low, high in zip(
      numbers, np.asarray(least), np.asarray(greatest), strict=True
    ):
      self.assertTrue(-126 <= low <= 0 <= high <= 126)
      for exponent in {low, (low + 1) // 2, high // 2, high}:
        self.assertTrue(_keeps_bits(x, int(exponent), form), (x, exponent))

  def test_range_ends_where_bits_of_a_stored_number_would_be_lost(self):
    numbers = _numbers(np.float16, exact=True)
    least, greatest = _exact_exponents_of_rows(numbers[:, None], np.float16)
    for x, low, high in zip(
      numbers, np.asarray(least), np.asarray(greatest), strict=True
    ):
      self.assertFalse(_keeps_bits(x, int(low) - 1, np.float16), (x, low))
      self.assertFalse(_keeps_bits(x, int(high) + 1, np.float16), (x, high))

  @parameterized.parameters(
    ([1.0], -24, 15),
    ([1.5, -0.25], -22, 15),
    ([2.0**-24, 1.0], 0, 15),  # the least number has no bit to lose
    ([65504.0], -29, 0),  # 2047 * 2^5
    ([0.0, -0.0], -126, 126),
    ([1 + 2.0**-12], -14, 14),  # rounded, it could be any number around it
    ([2.0**-20 + 2.0**-30], 0, 0),
    ([2.0**-149], 0, 0),
    ([1.0, np.inf], 0, 0),
    ([1.0, np.nan], 0, 0),
    ([70000.0], 0, 0),  # infinite in float16
  )
  def test_range_in_float16(self, numbers, least, greatest):
    result = _exact_exponents(np.float32(numbers), form=np.float16)
    self.assertEqual([int(x) for x in result], [least, greatest])


class ScaleMlpTest(parameterized.TestCase):
  @parameterized.parameters('relu', 'gated')
  def test_function_is_that_of_the_definition(self, form):
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    mlp = {
      'up': {'kernel': normal(5, 7), 'bias': normal(7)},
      'down': {'kernel': normal(7, 4), 'bias': normal(4)},
    }
    gate = normal(5, 7)

    def run(mlp, x):
      mlp = jax.tree.map(np.float64, mlp)
      hidden = x @ mlp['up']['kernel'] + mlp['up']['bias']
      gates = np.tanh(x @ gate) if form == 'gated' else hidden > 0
      hidden = gates * hidden
      return hidden @ mlp['down']['kernel'] + mlp['down']['bias']

    exponents = np.int32([0, 3, -2, 1, 0, -5, 7])
    scaled = jax.jit(neurons.scale_mlp)(mlp, exponents)
    np.testing.assert_array_equal(
      scaled['up']['kernel'], np.ldexp(mlp['up']['kernel'], exponents)
    )
    x = rng.standard_normal((3, 5))
    np.testing.assert_allclose(run(scaled, x), run(mlp, x), rtol=1e-12)

  def test_exponents_are_the_rounded_halves_of_the_differences(self):
    rng = np.random.default_rng(2)
    up, down = rng.uniform(1, 2, (6, 9)), rng.uniform(1, 2, (9, 6))
    octaves = np.array([0, 0, 0, 0, 0, 4, -6, 2, 0])
    mlp = {'up': {'kernel': np.ldexp(up, octaves)}, 'down': {'kernel': down}}
    mlp = jax.tree.map(lambda x: x.astype(np.float16), mlp)
    logs = [
      np.log2(np.sqrt(np.mean(np.square(np.float64(kernel)), axis=axis)))
      for kernel, axis in ((mlp['up']['kernel'], 0), (mlp['down']['kernel'], 1))
    ]
    u, d = (x - np.median(x) for x in logs)
    exponents = jax.jit(neurons.neuron_exponents, static_argnums=1)(mlp, np.float16)
    self.assertEqual(exponents.tolist(), np.round((d - u) / 2).tolist())
    self.assertEqual(exponents.tolist(), [0, 0, 0, 0, 0, -2, 3, -1, 0])

  def test_an_exponent_that_would_lose_bits_gives_way_to_the_nearest_that_does_not(
    self,
  ):
    up, down = np.ones((4, 5), np.float32), np.ones((5, 4), np.float32)
    up[:, 2] = 2.0**12  # wants 2^-6 here and 2^6 in down
    down[2, 0] = 2.0**13
    down[2, 1:] = 0
    mlp = {'up': {'kernel': up}, 'down': {'kernel': down}}
    find = jax.jit(neurons.neuron_exponents, static_argnums=1)
    self.assertEqual(find(mlp, np.float32)[2], 0)  # both are large alike
    down[2, 0] = 2.0**0
    self.assertEqual(find(mlp, np.float32)[2], -6)
    down[2, 1] = 2.0**12
    down[2, 0] = 2.0**-23
    up[:, 2] = 2.0**15
    self.assertEqual(find(mlp, np.float16)[2], -2)
    down[2, 1] = 2.0**15
    up[:, 2] = 2.0**-10
    wanted = find(mlp, np.float32)[2]
    self.assertEqual(wanted, 12)
    self.assertEqual(find(mlp, np.float16)[2], 1)  # 2^-24 is the least float16


class ScaleNeuronsTest(parameterized.TestCase):
  @parameterized.parameters('opt-small-sliced-0.2', 'phi3-tiny-sliced-0.25')
  def test_scales_of_whole_octaves_are_found_and_no_bit_of_the_logits_changes(
    self, name
  ):
    model = _perturbed(_model(name))
    scaled, notes = neurons.scale_neurons().apply(model)
    tokens = np.load(TESTDATA / name / 'ref_logits.npz')['input_ids'][:, :8]
    np.testing.assert_array_equal(_logits(scaled, tokens), _logits(model, tokens))
    for note in notes:
      before, after = note['spread']
      self.assertGreater(before, 1.2)
      self.assertLess(after, 0.3)
      self.assertGreater(note['scaled'], note['shape'][1] / 2)
    for layer, changed in zip(model.layers(), scaled.layers(), strict=True):
      mantissas = [
        np.frexp(np.float32(x['mlp']['up']['kernel']))[0] for x in (layer, changed)
      ]
      np.testing.assert_array_equal(*mantissas)

  @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
  def test_in_a_chain_it_commutes_with_rounding(self, form):
    rng = np.random.default_rng(3)
    model = _perturbed(_model('phi3-tiny-sliced-0.25'))
    # Numbers that no earlier transform has rounded.
    noise = lambda x: np.float32(x) * rng.uniform(0.99, 1.01, x.shape).astype('f')
    params = jax.tree.map(noise, model.params)
    wide = dataclasses.replace(model, params=params, stored_as=np.dtype(form).name)
    scaled, notes = neurons.scale_neurons().apply(wide)
    self.assertGreater(sum(note['scaled'] for note in notes), 10)
    for layer, changed in zip(wide.layers(), scaled.layers(), strict=True):
      up, new_up = (np.asarray(x['mlp']['up']['kernel']) for x in (layer, changed))
      down, new_down = (
        np.asarray(x['mlp']['down']['kernel']) for x in (layer, changed)
      )
      exponents = np.log2(new_up[0] / up[0]).astype(int)
      rounded = lambda x: np.float64(x.astype(form))
      np.testing.assert_array_equal(rounded(new_up), np.ldexp(rounded(up), exponents))
      np.testing.assert_array_equal(
        rounded(new_down), np.ldexp(rounded(down), -exponents[:, None])
      )

  def test_a_neuron_behind_gelu_is_not_scaled(self):
    model = _model('phi2-tiny-sliced-0.25')
    scaled, notes = neurons.scale_neurons().apply(model)
    self.assertIs(scaled, model)
    self.assertEmpty(notes)

  def test_a_kernel_that_is_structured_stays(self):
    model = _model('phi3-tiny-sliced-0.25')
    (block,) = (v for k, v in model.params.items() if k == 'blocks_0')
    kernel = block['mlp']['down']['kernel']
    leaf = structured.Constant.like(kernel, 1.0)
    mlp = block['mlp'] | {'down': {'kernel': leaf}}
    model = dataclasses.replace(
      model, params=model.params | {'blocks_0': block | {'mlp': mlp}}
    )
    scaled, notes = neurons.scale_neurons().apply(model)
    chex.assert_trees_all_equal(scaled.params['blocks_0'], model.params['blocks_0'])
    self.assertLen(notes, model.config.num_layers - model.group_sizes[0])

  def test_dead_neurons_and_numbers_that_are_not_finite_do_no_harm(self):
    model = _perturbed(_model('phi3-tiny-sliced-0.25'))
    block = jax.tree.map(np.array, model.params['blocks_0'])
    block['mlp']['up']['kernel'][:, :, 0] = 0
    block['mlp']['down']['kernel'][:, 1, 2] = np.inf
    block['mlp']['up']['kernel'][:, 3, 4] = np.nan
    model = dataclasses.replace(model, params=model.params | {'blocks_0': block})
    scaled, notes = neurons.scale_neurons().apply(model)
    mlp = scaled.params['blocks_0']['mlp']
    for j in (0, 1, 4):
      for part, index in (('up', (slice(None), slice(None), j)), ('down', (0, j))):
        np.testing.assert_array_equal(
          mlp[part]['kernel'][index], block['mlp'][part]['kernel'][index]
        )
    self.assertTrue(all(np.isfinite(note['spread']).all() for note in notes))
    self.assertGreater(notes[0]['scaled'], 20)


if __name__ == '__main__':
  absltest.main()
