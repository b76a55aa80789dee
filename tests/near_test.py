"""The preset `near`: uniform steps, the bound of the divergence, and its files."""

import functools
import pathlib
import tempfile
from unittest import mock
import weakref

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.passes import rounding
from rotbits_jax.presets import steps as steps_lib
from rotbits_jax.system import progress
from rotbits_jax.system import spool
from tests import random_models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
TINY = 'llama-tiny-sliced-head-0.25'


@functools.cache
def _load(name=TINY):
  return checkpoints.load_checkpoint(TESTDATA / name)


@functools.cache
def _file(step=-5.0):
  checkpoint = _load()
  return rotbits_jax.encode(
    checkpoint.model,
    preset='near',
    step=step,
    files=checkpoint.files,
    stem=checkpoint.stem,
  )


class PresetTest(parameterized.TestCase):
  def test_offsets_are_by_kind_of_parameter(self):
    offsets = {'layers.*/mlp/up/kernel': 2.0}
    octaves = presets.near(step=-4.0, offsets=offsets).rounding.log2_step
    dtype = np.dtype(np.float16)
    self.assertEqual(octaves('layers.12/mlp/up/kernel', dtype), -2.0)
    self.assertEqual(octaves('layers.12/mlp/down/kernel', dtype), -4.0)

  def test_decoding_gives_the_rounded_numbers(self):
    preset = presets.near(step=-5.0)
    expected, _ = passes.run_chain(
      (preset.transform,), _load().model, rounding=preset.rounding
    )
    decoded = rotbits_jax.decode(_file())
    for (path, a), (_, b) in zip(
      structured.flatten(decoded.outer()).items(),
      structured.flatten(expected.outer()).items(),
      strict=True,
    ):
      b = b.materialize() if isinstance(b, structured.UniformlyQuantized) else b
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)

  def test_matrices_are_float32_multiples_of_one_step(self):
    for layer in rotbits_jax.decode(_file()).layers():
      for path, leaf in structured.flatten(layer).items():
        for x in jax.tree.leaves(leaf):
          if rounding.is_matrix(x):
            self.assertEqual(x.dtype, np.float32, path)
            self.assertLess(np.unique(np.abs(x)).size, 400, path)

  def test_a_coarser_step_takes_fewer_bytes(self):
    self.assertLess(len(_file(-3.0)), len(_file(-5.0)))
    free = rotbits_jax.encode(_load().model, preset='free')
    self.assertLess(len(_file(-5.0)), 0.9 * len(free))

  def test_load_in_another_dtype(self):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
      model = rotbits_jax.load(_file(), dtype=dtype)
      for leaf in jax.tree.leaves(model.params):
        self.assertEqual(leaf.dtype, dtype)

  def test_checkpoints_have_the_dtype_of_the_input(self):
    for dtype, expected in (
      (None, _load().model.params['head']['kernel'].dtype),
      ('float32', np.float32),
    ):
      with tempfile.TemporaryDirectory() as folder:
        rotbits_jax.decode_to_directory(_file(), folder, dtype=dtype)
        again = checkpoints.load_checkpoint(folder).model
      self.assertEqual(again.params['head']['kernel'].dtype, expected)


def _pairs(plain, loaded):
  """The parameters of two models by path, `UniformlyQuantized` among them as arrays."""
  plain, loaded = structured.flatten(plain.params), structured.flatten(loaded.params)
  for path in plain.keys() | loaded.keys():
    leaf = loaded[path]
    array = (
      leaf.materialize() if isinstance(leaf, structured.UniformlyQuantized) else leaf
    )
    yield path, plain[path], array


def _multiples(model):
  leaves = structured.flatten(model.params).values()
  return [x for x in leaves if isinstance(x, structured.UniformlyQuantized)]


def _nbytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


class IntegersTest(parameterized.TestCase):
  def assert_same_bits(self, plain, loaded):
    for path, a, b in _pairs(plain, loaded):
      self.assertEqual(jax.tree.structure(a), jax.tree.structure(b), path)
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        self.assertEqual((x.dtype, x.shape), (y.dtype, y.shape), path)
        self.assertEqual(np.asarray(x).tobytes(), np.asarray(y).tobytes(), path)

  @parameterized.parameters(-3.0, -7.0)
  def test_integers_stand_for_the_same_numbers(self, step):
    plain = rotbits_jax.load(_file(step))
    loaded = rotbits_jax.load(_file(step), integers=True)
    self.assert_same_bits(plain, loaded)
    found = _multiples(loaded)
    self.assertLen(found, 13)
    numbers = sum(int(np.prod(x.shape)) for x in found)
    saved = 2 * numbers - sum(x.step.nbytes for x in found)
    self.assertEqual(_nbytes(plain.params) - _nbytes(loaded.params), saved)

  def test_their_params_are_encoded_as_numbers(self):
    head = rotbits_jax.load(_file(-3.0), integers=True).params['head']
    self.assertIsInstance(head['kernel'], structured.UniformlyQuantized)
    found = rotbits_jax.decode(rotbits_jax.encode({'head': head}))['head']['kernel']
    np.testing.assert_array_equal(found, head['kernel'].materialize())

  @pytest.mark.slow
  def test_predictions_are_the_same(self):
    self.check_predictions(TINY)

  @pytest.mark.slow
  def test_predictions_of_a_dense_model_are_the_same(self):
    self.check_predictions('llama-tiny-dense')

  def check_predictions(self, name):
    data = rotbits_jax.encode(_load(name).model, preset='near')
    tokens = np.arange(8)[None]
    logits, taken = jax.jit(models.logits), []
    for integers in (False, True):
      model = rotbits_jax.load(data, integers=integers)
      generated = models.generation.generate(model, tokens[0], max_tokens=3)
      taken.append((np.asarray(logits(model, tokens)), list(generated)))
    np.testing.assert_array_equal(taken[0][0], taken[1][0])
    self.assertEqual(taken[0][1], taken[1][1])

  def test_with_layers_dtypes_and_shardings(self):
    mesh = jax.make_mesh((1,), ('layers',))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('layers'))
    columns = jax.sharding.PartitionSpec(None, None, 'layers')

    def place(path, shape):
      spec = columns if len(shape) == 3 else jax.sharding.PartitionSpec()
      return jax.sharding.NamedSharding(mesh, spec)

    for options in (
      {'layers': range(1, 2)},
      {'dtype': jnp.bfloat16},
      {'sharding': spread},
      {'sharding': place},
      {'sharding': jax.sharding.SingleDeviceSharding(jax.devices()[0])},
    ):
      plain = rotbits_jax.load(_file(-3.0), **options)
      loaded = rotbits_jax.load(_file(-3.0), integers=True, **options)
      self.assertTrue(_multiples(loaded))
      self.assert_same_bits(plain, loaded)
    params = rotbits_jax.load(_file(-3.0), integers=True, sharding=place).params
    kernel = params['layers.0:1']['mlp']['down']['kernel']
    self.assertEqual(kernel.integers.sharding.spec, columns)

  @parameterized.parameters('free', 'exact')
  def test_other_presets_have_no_steps(self, preset):
    data = rotbits_jax.encode(_load().model, preset=preset)
    loaded = rotbits_jax.load(data, integers=True)
    self.assertEmpty(_multiples(loaded))
    self.assert_same_bits(rotbits_jax.load(data), loaded)


class _Watched:
  """A model that counts the arrays of one kernel of its layers that are in memory."""

  def __init__(self, model):
    self._model, self.config, self.records = model, model.config, model.records
    self.specs = model.specs
    self._shape = model.layer(0)['mlp']['down']['kernel'].shape
    self._alive = []
    self.most = self.reads = 0

  def note(self, tree):
    for x in jax.tree.leaves(tree):
      if x.shape == self._shape:
        self._alive.append(weakref.ref(x))
        self.reads += 1
    self._alive = [x for x in self._alive if x() is not None]
    on_device = sum(x.shape == self._shape for x in jax.live_arrays())
    self.most = max(self.most, len(self._alive) + on_device)
    return tree

  def read(self, record):
    return self.note(jax.tree.map(np.copy, self._model.read(record)))

  def outer(self):
    return self._model.outer()


class SearchTest(parameterized.TestCase):
  def _tokens(self, count=256):
    vocabulary = _load().model.config.vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, count)

  @pytest.mark.slow
  @pytest.mark.daily
  def test_the_divergence_of_the_file_is_below_the_bound(self):
    model, tokens = _load().model, self._tokens()
    found = steps_lib.search(model, tokens, max_kl=1e-3)
    data = rotbits_jax.encode(
      model,
      preset='near',
      step=found.step,
      offsets=found.offsets,
      inputs=found.inputs,
    )
    decoded = rotbits_jax.decode(data)
    measured = evaluation.compare({'near': decoded}, tokens, {'model': model})
    kl = measured['near'].kl['model']
    self.assertLessEqual(kl, 1e-3)
    self.assertAlmostEqual(kl / dict(found.curve)[found.step], 1, delta=0.01)
    # The next step that was measured is too coarse.
    coarser = [point.kl for point in found.curve if point.step > found.step]
    self.assertTrue(all(kl > 1e-3 for kl in coarser))

  def test_the_search_rounds_what_encode_rounds(self):
    config = random_models.BASE | {'num_hidden_layers': 1}
    large = random_models.random_model(config, np.float16)
    large.params['embed']['tokens'][3, 0] = 65504  # no rotation is possible
    for name, model, tolerance in (
      ('large', large, 0.7),
      ('coarse', _load().model, 9),
      ('tied', seeds.sliced_model(seeds.OPT), 0.7),
    ):
      with self.subTest(name):
        preset = presets.near(tolerance=tolerance)
        context = passes.make_context(model)
        rewritten = passes.rewrite(context, preset.transform, rounding=preset.rounding)
        records = [record for some, _ in rewritten for record in some]
        with progress.Progress('test', 9, 'record', show=False) as bar:
          own = steps_lib._rewritten(model, tolerance, None, bar)
        parts = [models.names.layer(i) for i in range(model.config.num_layers)]
        for part in (*parts, None):
          for name, tree in passes.round_part(own, part, preset.rounding).items():
            (expected,) = (x.params[name] for x in records if x.name == name)
            chex.assert_trees_all_equal(tree, expected)
            chex.assert_trees_all_equal_dtypes(tree, expected)

  def test_a_few_layers_are_in_memory(self):
    config = random_models.BASE | {'num_hidden_layers': 12, 'intermediate_size': 57}
    source = _Watched(random_models.random_model(config, np.float16))
    read = spool.Spool.__getitem__
    noted = lambda own, key: source.note(read(own, key))
    with mock.patch.object(spool.Spool, '__getitem__', noted):
      steps_lib.search(source, np.arange(32), max_kl=1e-2)
    self.assertGreater(source.reads, 4 * 12)
    self.assertLessEqual(source.most, 6)

  def test_a_decoded_checkpoint_keeps_the_bound(self):
    model = structured.astype(_load().model, ml_dtypes.bfloat16)
    tokens, bound = self._tokens(), 6e-5  # rounding to bfloat16 causes about half of it
    found = steps_lib.search(model, tokens, max_kl=bound)
    options = {'step': found.step, 'offsets': found.offsets, 'inputs': found.inputs}
    decoded = rotbits_jax.decode(rotbits_jax.encode(model, preset='near', **options))
    stored = structured.astype(decoded.materialize(), ml_dtypes.bfloat16)
    measured = evaluation.compare({'near': stored}, tokens, {'model': model})
    self.assertLessEqual(measured['near'].kl['model'], bound)

  def test_the_search_measures_what_decode_writes(self):
    widths = (48,) * 32 + (64,)  # many shortcuts, whose diagonals are near 1
    config = random_models.BASE | {
      'hidden_size': 64,
      'intermediate_size': 96,
      'num_key_value_heads': 2,
      'num_hidden_layers': 16,
    }
    model = random_models.sliced(config, widths, ml_dtypes.bfloat16)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 512)
    found = steps_lib.search(model, tokens, max_kl=1e-3)
    options = {'step': found.step, 'offsets': found.offsets, 'inputs': found.inputs}
    decoded = rotbits_jax.decode(rotbits_jax.encode(model, preset='near', **options))
    stored = structured.astype(decoded.materialize(), ml_dtypes.bfloat16)
    measured = evaluation.compare({'near': stored}, tokens, {'model': model})
    np.testing.assert_allclose(measured['near'].kl['model'], found.kl, rtol=0.02)

  def test_numbers_that_are_not_finite_have_no_errors(self):
    config = random_models.BASE | {'num_hidden_layers': 1}
    model = random_models.random_model(config, np.float16)
    embed = {'tokens': model.params['embed']['tokens'].copy()}
    embed['tokens'][-1] = np.nan
    model = model.replace(params=model.params | {'embed': embed})
    self.assertFalse(model.config.tied_head)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size - 1, 256)
    found = steps_lib.calibrate(model, tokens)
    self.assertIn('embed/tokens', found.offsets)
    self.assertTrue(np.isfinite(list(found.offsets.values())).all())

  def test_a_bound_that_cannot_be_kept(self):
    for wrong in (0.0, -1.0, np.inf, np.nan):
      with self.assertRaisesRegex(ValueError, 'max_kl'):
        steps_lib.search(_load().model, self._tokens(), max_kl=wrong)

  def test_tokens_are_checked(self):
    model = _load().model
    for wrong, words in (
      (self._tokens()[:0], 'at least 2 tokens'),
      (self._tokens() + model.config.vocab_size, 'vocabulary'),
    ):
      with self.assertRaisesRegex(ValueError, words):
        steps_lib.search(model, wrong, max_kl=1e-3)

  @parameterized.parameters(
    ({-5.0: 1e-3}, 1e-1),
    ({-5.0: 1e-1}, 1e-3),
    ({-5.0: 1e-3, -2.0: 1e-1}, 1e-2),
    ({-5.0: 1e-3, -4.75: 1e-1}, 1e-2),
    ({-5.0: 1e-3, -4.875: 1e-1}, 1e-2),
  )
  def test_steps_are_searched_between_the_bounds(self, curve, max_kl):
    step = steps_lib._next_step(curve, max_kl)
    fine = max((s for s, kl in curve.items() if kl <= max_kl), default=-13)
    coarse = min((s for s, kl in curve.items() if kl > max_kl), default=1)
    if coarse - fine <= 0.125:
      self.assertIsNone(step)
    else:
      self.assertBetween(step, fine + 0.125, coarse - 0.125)

  @parameterized.parameters(0.5, 1e-2, 1e-5)
  def test_a_search_needs_few_evaluations(self, max_kl):
    curve, step = {}, -5.0
    while step is not None and len(curve) < steps_lib._EVALUATIONS:
      curve[step] = 0.7 * 4.0**step + 1e-6  # the dtype makes a little of it
      step = steps_lib._next_step(curve, max_kl)
    self.assertIsNone(step)
    best = max(s for s, kl in curve.items() if kl <= max_kl)
    self.assertGreater(0.7 * 4.0 ** (best + 0.125), max_kl if best < 0 else 0)


if __name__ == '__main__':
  absltest.main()
