"""The preset `near`: uniform steps, the bound of the divergence, and its files."""

import functools
import pathlib
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.passes import rounding
from rotbits_jax.presets import steps as steps_lib
from tests import random_models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
TINY = 'llama-tiny-sliced-head-0.25'


@functools.cache
def load(name=TINY):
  return checkpoints.load_checkpoint(TESTDATA / name)


@functools.cache
def encoded(step=-5.0):
  return rotbits_jax.encode(load(), preset='near', step=step)


def tokens_of(model, count=256):
  return np.random.default_rng(0).integers(0, model.config.vocab_size, count)


def nbytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def is_multiple(leaf):
  return isinstance(leaf, structured.UniformlyQuantized)


def multiples(model):
  return [x for x in structured.flatten(model.params).values() if is_multiple(x)]


def assert_same_bits(plain, loaded):
  """Compares parameters; leaves of integers stand for their arrays."""
  plain, loaded = structured.flatten(plain.params), structured.flatten(loaded.params)
  assert plain.keys() == loaded.keys()
  for path, leaf in loaded.items():
    leaf = leaf.materialize() if is_multiple(leaf) else leaf
    pairs = zip(jax.tree.leaves(plain[path]), jax.tree.leaves(leaf), strict=True)
    for x, y in pairs:
      assert (x.dtype, x.shape) == (y.dtype, y.shape), path
      assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_offsets_are_by_pattern_of_path():
  offsets = {'layers.*/mlp/up/kernel': 2.0}
  octaves = presets.near(step=-4.0, offsets=offsets).rounding.log2_step
  dtype = np.dtype(np.float16)
  assert octaves('layers.12/mlp/up/kernel', dtype) == -2.0
  assert octaves('layers.12/mlp/down/kernel', dtype) == -4.0


def test_matrices_are_float32_multiples_of_one_step():
  for layer in rotbits_jax.decode(encoded()).layers():
    for path, leaf in structured.flatten(layer).items():
      for x in jax.tree.leaves(leaf):
        if rounding.is_matrix(x):
          assert x.dtype == np.float32, path
          assert np.unique(np.abs(x)).size < 400, path


def test_a_coarser_step_takes_fewer_bytes():
  assert len(encoded(-3.0)) < len(encoded(-5.0))
  free = rotbits_jax.encode(load(), preset='free')
  assert len(encoded(-5.0)) < 0.9 * len(free)


@pytest.mark.parametrize('dtype', [None, 'float32'])
def test_checkpoints_have_the_dtype_of_the_input(tmp_path, dtype):
  rotbits_jax.decode_to_directory(encoded(), tmp_path, dtype=dtype)
  kernel = checkpoints.load_checkpoint(tmp_path).model.params['head']['kernel']
  assert kernel.dtype == (dtype or load().model.params['head']['kernel'].dtype)


@pytest.mark.parametrize('step', [-3.0, -7.0])
def test_integers_stand_for_the_same_numbers(step):
  plain = rotbits_jax.load(encoded(step))
  loaded = rotbits_jax.load(encoded(step), integers=True)
  assert_same_bits(plain, loaded)
  leaves = multiples(loaded)
  assert len(leaves) == 13
  saved = sum(2 * int(np.prod(x.shape)) - x.step.nbytes for x in leaves)
  assert nbytes(plain.params) - nbytes(loaded.params) == saved


def test_integers_are_encoded_as_numbers():
  head = rotbits_jax.load(encoded(-3.0), integers=True).params['head']
  found = rotbits_jax.decode(rotbits_jax.encode({'head': head}))['head']['kernel']
  np.testing.assert_array_equal(found, head['kernel'].materialize())


@pytest.mark.slow
@pytest.mark.parametrize('name', [TINY, 'llama-tiny-dense'])
def test_predictions_of_integers_are_the_same(name):
  data = rotbits_jax.encode(load(name).model, preset='near')
  logits = jax.jit(models.logits)
  plain, loaded = (
    logits(rotbits_jax.load(data, integers=integers), np.arange(8)[None])
    for integers in (False, True)
  )
  np.testing.assert_array_equal(plain, loaded)


MESH = jax.make_mesh((1,), ('layers',))
LAYERS = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec('layers'))
COLUMNS = jax.sharding.PartitionSpec(None, None, 'layers')


def place(path, shape):
  spec = COLUMNS if len(shape) == 3 else jax.sharding.PartitionSpec()
  return jax.sharding.NamedSharding(MESH, spec)


@pytest.mark.parametrize(
  'options',
  [
    {'layers': range(1, 2)},
    {'dtype': jnp.bfloat16},
    {'sharding': LAYERS},
    {'sharding': place},
  ],
)
def test_integers_with_layers_dtypes_and_shardings(options):
  plain = rotbits_jax.load(encoded(-3.0), **options)
  loaded = rotbits_jax.load(encoded(-3.0), integers=True, **options)
  assert multiples(loaded)
  assert_same_bits(plain, loaded)
  for leaf in multiples(loaded):
    if options.get('sharding') is place and leaf.integers.ndim == 3:
      assert leaf.integers.sharding.spec == COLUMNS


@pytest.mark.parametrize('preset', ['free', 'exact'])
def test_other_presets_have_no_steps(preset):
  data = rotbits_jax.encode(load().model, preset=preset)
  loaded = rotbits_jax.load(data, integers=True)
  assert not multiples(loaded)
  assert_same_bits(rotbits_jax.load(data), loaded)


def divergence_of(calibration, model, tokens):
  """Returns the mean KL of the decoded checkpoint, in the dtype of the model."""
  data = rotbits_jax.encode(model, preset='near', **calibration.options)
  decoded = rotbits_jax.decode(data)
  dtype = model.params['embed']['tokens'].dtype
  stored = structured.astype(decoded.materialize(), dtype)
  return evaluation.evaluate(stored, tokens, reference=model).kl


@pytest.mark.parametrize(
  ('dtype', 'bound'),
  [
    pytest.param('float16', 1e-3, marks=pytest.mark.slow),
    ('bfloat16', 6e-5),  # rounding to bfloat16 causes about half of it
  ],
)
def test_the_divergence_of_the_file_is_below_the_bound(dtype, bound):
  model = structured.astype(load().model, jnp.dtype(dtype))
  tokens = tokens_of(model)
  calibration = steps_lib.calibrate(model, tokens, max_kl=bound)
  assert calibration.offsets
  assert calibration.inputs
  kl = divergence_of(calibration, model, tokens)
  assert kl <= bound
  assert kl == pytest.approx(calibration.kl, rel=0.01)
  # The next step that was measured is too coarse.
  assert all(
    point.kl > bound for point in calibration.curve if point.step > calibration.step
  )


def test_the_search_measures_what_decode_writes():
  widths = (48,) * 32 + (64,)  # many shortcuts, whose diagonals are near 1
  config = random_models.BASE | {
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_key_value_heads': 2,
    'num_hidden_layers': 16,
  }
  model = random_models.sliced(config, widths, ml_dtypes.bfloat16)
  tokens = tokens_of(model, 512)
  calibration = steps_lib.calibrate(model, tokens, max_kl=1e-3)
  assert divergence_of(calibration, model, tokens) == pytest.approx(
    calibration.kl, rel=0.02
  )


class Watched:
  """A model that counts the arrays of one kernel of its layers that are in memory."""

  def __init__(self, model):
    self._model, self.config, self.records = model, model.config, model.records
    self.specs, self.outer = model.specs, model.outer
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


def test_a_few_layers_are_in_memory():
  config = random_models.BASE | {'num_hidden_layers': 12, 'intermediate_size': 57}
  source = Watched(random_models.random_model(config, np.float16))
  steps_lib.calibrate(source, np.arange(32), max_kl=1e-2)
  assert source.reads >= 2 * 12
  assert source.most <= 6


def test_numbers_that_are_not_finite_have_no_errors():
  config = random_models.BASE | {'num_hidden_layers': 1}
  model = random_models.random_model(config, np.float16)
  embed = {'tokens': model.params['embed']['tokens'].copy()}
  embed['tokens'][-1] = np.nan
  model = model.replace(params=model.params | {'embed': embed})
  tokens = tokens_of(model) % (model.config.vocab_size - 1)
  calibration = steps_lib.calibrate(model, tokens)
  assert 'embed/tokens' in calibration.offsets
  assert np.isfinite(list(calibration.offsets.values())).all()


@pytest.mark.parametrize(
  ('tokens', 'max_kl', 'words'),
  [
    ([1, 2, 3], 0.0, 'max_kl'),
    ([1, 2, 3], np.inf, 'max_kl'),
    ([], 1e-3, 'at least 2 tokens'),
    ([1, 100_000], 1e-3, 'vocabulary'),
  ],
)
def test_bad_arguments(tokens, max_kl, words):
  with pytest.raises(ValueError, match=words):
    steps_lib.calibrate(load().model, np.array(tokens, np.int32), max_kl=max_kl)


@pytest.mark.parametrize(
  ('curve', 'max_kl', 'expected'),
  [
    ({-5.0: 1e-3}, 1e-1, -1.75),
    ({-5.0: 1e-1}, 1e-3, -8.375),
    ({-5.0: 1e-3, -2.0: 1e-1}, 1e-2, -3.75),
    ({-5.0: 1e-3, -4.75: 1e-1}, 1e-2, -4.875),
    ({-5.0: 1e-3, -4.875: 1e-1}, 1e-2, None),
    ({passes.FINEST: 1.0}, 1e-2, None),
    ({0.0: 1e-3}, 1e-2, None),
  ],
)
def test_steps_are_searched_between_the_bounds(curve, max_kl, expected):
  assert steps_lib._next_step(curve, max_kl) == expected


@pytest.mark.parametrize('max_kl', [0.5, 1e-2, 1e-5])
def test_a_search_needs_few_evaluations(max_kl):
  curve, step = {}, -5.0
  while step is not None and len(curve) < steps_lib._EVALUATIONS:
    curve[step] = 0.7 * 4.0**step + 1e-6  # the dtype makes a little of it
    step = steps_lib._next_step(curve, max_kl)
  assert step is None
