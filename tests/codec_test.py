"""Models to bytes and back: the contract."""

import functools
import importlib.resources
import itertools
import json
import pathlib
import struct as struct_lib

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import ml_dtypes
import numpy as np
import pytest

from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
CHECKPOINTS = tuple(
  sorted(path.name for path in TESTDATA.iterdir() if (path / 'config.json').exists())
)
TINY = 'llama-tiny-sliced-head-0.25'
# Most of the time goes into compilation, so the other families are slow tests.
QUICK = (TINY, 'llama-tiny-dense', 'opt-small-sliced-0.2')
SHORT = (np.float16, ml_dtypes.bfloat16)
OTHERS = tuple(name for name in CHECKPOINTS if name not in QUICK)


@functools.cache
def _load(name):
  return checkpoints.load_checkpoint(TESTDATA / name)


@functools.cache
def _encoded(name, preset):
  checkpoint = _load(name)
  return rotbits_jax.encode(
    checkpoint.model, preset=preset, files=checkpoint.files, stem=checkpoint.stem
  )


def _tokens(name):
  """Returns tokens of a text; random ones for models that have no tokenizer."""
  checkpoint = _load(name)
  if 'tokenizer.json' not in checkpoint.files:
    config = checkpoint.model.config
    count = 16 * min(256, config.max_positions)
    return np.random.default_rng(0).integers(0, config.vocab_size, count)
  text = importlib.resources.files('rotbits_jax') / 'data' / 'evaluation.txt'
  return evaluation.encode_text(checkpoint.files, text.read_text('utf-8'))[:2048]


def _cast(model, dtype):
  return jax.tree.map(lambda x: np.asarray(x).astype(dtype), model)


def _with_sorted_neurons(layer):
  """Sorts the neurons of a layer, so that layers in different orders become equal."""
  mlp = layer['mlp']
  if any(structured.is_structured(linear['kernel']) for linear in mlp.values()):
    return layer
  axes = {name: 0 if name == 'down' else -1 for name in mlp}
  rows = np.concatenate(
    [np.moveaxis(mlp[n]['kernel'], axis, 0) for n, axis in axes.items()], axis=1
  )
  order = sorted(range(len(rows)), key=lambda i: rows[i].tobytes())
  for name, axis in axes.items():
    for kind, x in mlp[name].items():
      if not (name == 'down' and kind == 'bias'):
        mlp = mlp | {name: mlp[name] | {kind: np.take(x, order, axis=axis)}}
  return layer | {'mlp': mlp}


def _assert_same_bits(actual, expected):
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _flip(data, stream, position=5):
  """Returns the file with one bit of a stream flipped."""
  (length,) = struct_lib.unpack('<Q', data[:8])
  begin, _ = json.loads(data[8 : 8 + length])[stream]['data_offsets']
  damaged = bytearray(data)
  damaged[8 + length + begin + position] ^= 1
  return bytes(damaged)


class Checks(parameterized.TestCase):
  """Checks that every checkpoint must pass."""

  def check_exact_gives_every_tensor_back(self, name):
    decoded = rotbits_jax.decode_checkpoint(_encoded(name, 'exact'))
    _assert_same_bits(decoded.model, _load(name).model)
    self.assertEqual(decoded.files, _load(name).files)
    self.assertEqual(decoded.stem, _load(name).stem)
    given = checkpoints.to_tensors(_load(name).model)
    back = checkpoints.to_tensors(decoded.model)
    self.assertEqual(list(back), list(given))

  def check_free_gives_the_canonical_model_back(self, name):
    free = presets.free()
    canonical, _ = passes.run_chain(
      (free.transform,), _load(name).model, rounding=free.rounding
    )
    decoded = rotbits_jax.decode(_encoded(name, 'free'))
    self.assertEqual(decoded.config, canonical.config)
    layers = list(zip(decoded.layers(), canonical.layers(), strict=True))
    for got, expected in layers:
      _assert_same_bits(_with_sorted_neurons(got), _with_sorted_neurons(expected))
    _assert_same_bits(decoded.outer(), canonical.outer())

  def check_report_adds_up_to_the_byte(self, name, preset):
    data = _encoded(name, preset)
    report = rotbits_jax.inspect(data)
    tensors = checkpoints.to_tensors(_load(name).model)
    self.assertEqual(report.file_bytes, len(data))
    self.assertEqual(report.input_bytes, sum(t.nbytes for t in tensors.values()))
    self.assertEqual(report.input_elements, sum(t.size for t in tensors.values()))
    saved = sum(line.bytes_saved for line in report.lines)
    self.assertEqual(saved, report.input_bytes - report.file_bytes)
    numbers = sum(line.elements_saved for line in report.lines)
    self.assertEqual(numbers, report.input_elements - report.stored_elements)


class RoundTripTest(Checks):
  @parameterized.parameters(*QUICK)
  def test_exact_gives_every_tensor_back(self, name):
    self.check_exact_gives_every_tensor_back(name)

  @parameterized.parameters(*QUICK)
  def test_free_gives_the_canonical_model_back(self, name):
    self.check_free_gives_the_canonical_model_back(name)

  @parameterized.parameters(ml_dtypes.bfloat16, np.float32)
  def test_other_dtypes(self, dtype):
    model = _cast(_load(TINY).model, dtype)
    exact, free = (
      rotbits_jax.decode(rotbits_jax.encode(model, preset=preset))
      for preset in ('exact', 'free')
    )
    _assert_same_bits(exact, model)
    self.assertEqual(free.params['embed']['tokens'].dtype, np.dtype(dtype))

  @parameterized.parameters('exact', 'free')
  def test_encoding_twice_gives_the_same_bytes(self, preset):
    self.assertEqual(_encoded.__wrapped__(TINY, preset), _encoded(TINY, preset))

  def test_layers_decode_on_their_own(self):
    layers = list(rotbits_jax.decode(_encoded(TINY, 'free')).layers())
    data = _flip(_encoded(TINY, 'free'), 'layers.1')
    for i in (0, 2):
      name = f'layers.{i}'
      _assert_same_bits(rotbits_jax.read_record(data, name), {name: layers[i]})
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'layers.1'):
      rotbits_jax.read_record(data, 'layers.1')
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'layers.9'):
      rotbits_jax.read_record(data, 'layers.9')

  @parameterized.parameters('exact', 'free')
  def test_some_layers_load_without_the_others(self, preset):
    name = 'opt-small-sliced-0.2'
    data = _flip(_encoded(name, preset), 'layers.0')
    whole = rotbits_jax.decode(_encoded(name, preset))
    model = rotbits_jax.load(data, layers=range(1, 3))
    for layer, i in zip(model.layers(), (1, 2), strict=True):
      _assert_same_bits(layer, whole.layer(i))
    _assert_same_bits(model.outer(), whole.outer())
    with self.assertRaisesRegex(ValueError, 'layers'):
      rotbits_jax.load(data, layers=range(3, 9))
    with self.assertRaisesRegex(ValueError, 'layers.0: the model lacks it'):
      rotbits_jax.encode(model, preset=preset)


@pytest.mark.slow
class OtherCheckpointsTest(Checks):
  @parameterized.parameters('phi2-tiny-sliced-0.25', 'phi3-tiny-sliced-0.25')
  @pytest.mark.daily
  def test_free_gives_the_canonical_model_back(self, name):
    self.check_free_gives_the_canonical_model_back(name)

  @parameterized.parameters(*zip(CHECKPOINTS, itertools.cycle(SHORT), strict=False))
  @pytest.mark.daily
  def test_free_has_the_function_up_to_twice_the_noise(self, name, dtype):
    self.check_function(name, dtype)

  @parameterized.parameters(
    *zip(CHECKPOINTS, itertools.cycle(SHORT[::-1]), strict=False)
  )
  def test_free_has_the_function_in_the_other_dtype(self, name, dtype):
    self.check_function(name, dtype)

  def check_function(self, name, dtype):
    model = _cast(_load(name).model, dtype)
    free = rotbits_jax.load(rotbits_jax.encode(model, preset='free'))
    compared = {'same': model, 'free': free} | {
      f'noise {i}': passes.randomly_rotated(model, key=jax.random.key(i))
      for i in range(3)
    }
    found = {
      key: evaluation.evaluate(x, _tokens(name), reference=model)
      for key, x in compared.items()
    }
    noise = np.mean([x.kl for key, x in found.items() if 'noise' in key])
    self.assertLess(found['free'].kl, max(2 * noise, 1e-9))
    ratio = found['free'].perplexity / found['same'].perplexity
    # If log-probabilities differ by noise, its mean square is twice the divergence.
    noise = np.sqrt(2 * found['free'].kl / found['free'].tokens)
    self.assertLess(abs(ratio - 1), max(0.001, 3 * noise))

  @parameterized.parameters(*OTHERS)
  def test_all_checks(self, name):
    self.check_exact_gives_every_tensor_back(name)
    self.check_free_gives_the_canonical_model_back(name)
    for preset in ('exact', 'free'):
      self.check_report_adds_up_to_the_byte(name, preset)


class SizeTest(Checks):
  @parameterized.product(name=QUICK, preset=['exact', 'free'])
  def test_report_adds_up_to_the_byte(self, name, preset):
    self.check_report_adds_up_to_the_byte(name, preset)

  def test_trained_checkpoint_shrinks_as_promised(self):
    name = 'opt-small-sliced-0.2'
    size = rotbits_jax.inspect(_encoded(name, 'exact')).input_bytes
    self.assertLess(len(_encoded(name, 'exact')), 0.851 * size)
    self.assertLess(len(_encoded(name, 'free')), 0.804 * size)

  def test_noise_is_no_larger_than_plain_storage_and_a_small_header(self):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 16, (300, 1000)).astype(np.uint16).view(np.float16)
    data = rotbits_jax.encode({'x': noise}, preset='exact')
    self.assertLess(len(data), noise.nbytes + 1000)

  @parameterized.parameters(*presets.PRESETS)
  def test_models_of_noise_are_no_larger_than_plain_storage(self, preset):
    rng = np.random.default_rng(0)
    bits = lambda x: rng.integers(0, 1 << 16, x.shape).astype(np.uint16)
    noise = jax.tree.map(lambda x: bits(x).view(np.float16), _load(TINY).model)
    data = rotbits_jax.encode(noise, preset=preset)
    report = rotbits_jax.inspect(data)
    self.assertLess(len(data), report.input_bytes + 10_000)


class ErrorsTest(parameterized.TestCase):
  def test_flipped_bits_never_give_wrong_weights(self):
    model = seeds.sliced_model(seeds.LLAMA)
    data = rotbits_jax.encode(model, preset='free', files=seeds.FILES, stem='tiny')
    for position in np.linspace(0, len(data) - 1, 120).astype(int):
      damaged = bytearray(data)
      damaged[position] ^= 1 << position % 8
      with self.assertRaises(rotbits_jax.ContainerError):
        rotbits_jax.decode_checkpoint(bytes(damaged))


if __name__ == '__main__':
  absltest.main()
