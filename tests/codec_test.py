"""Models to bytes and back: the contract."""

import functools
import importlib.resources
import json
import struct as struct_lib

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
from tests import cases

TINY = 'llama-tiny-sliced-head-0.25'
# Most of the time goes into compilation, so the other families are slow tests.
QUICK = (TINY, 'llama-tiny-dense', 'opt-small-sliced-0.2')
ALL = [
  pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
  for name in cases.CHECKPOINTS
]


@functools.cache
def _encoded(name, preset):
  return rotbits_jax.encode(cases.load(name), preset=preset)


def _tokens(name):
  """Returns tokens of a text; random ones for models that have no tokenizer."""
  checkpoint = cases.load(name)
  if 'tokenizer.json' not in checkpoint.files:
    config = checkpoint.model.config
    count = 16 * min(256, config.max_positions)
    return np.random.default_rng(0).integers(0, config.vocab_size, count)
  text = importlib.resources.files('rotbits_jax') / 'data' / 'evaluation.txt'
  return evaluation.encode_text(checkpoint.files, text.read_text('utf-8'))[:2048]


def _cast(model, dtype):
  return jax.tree.map(lambda x: np.asarray(x).astype(dtype), model)


def _assert_same_bits(actual, expected):
  actual, expected = jax.device_get((actual, expected))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  assert structured.same_bits(jax.tree.leaves(actual), jax.tree.leaves(expected))


def _flip(data, stream, position=5):
  """Returns the file with one bit of a stream flipped."""
  (length,) = struct_lib.unpack('<Q', data[:8])
  begin, _ = json.loads(data[8 : 8 + length])[stream]['data_offsets']
  damaged = bytearray(data)
  damaged[8 + length + begin + position] ^= 1
  return bytes(damaged)


# ---- round trips ---------------------------------------------------------------------


@pytest.mark.parametrize('name', ALL)
def test_exact_gives_every_tensor_back(name):
  decoded = rotbits_jax.decode_checkpoint(_encoded(name, 'exact'))
  _assert_same_bits(decoded.model, cases.load(name).model)
  assert (decoded.files, decoded.stem) == (
    cases.load(name).files,
    cases.load(name).stem,
  )
  tensors = [checkpoints.to_tensors(x.model) for x in (decoded, cases.load(name))]
  assert list(tensors[0]) == list(tensors[1])


@pytest.mark.parametrize('name', ALL)
def test_free_gives_the_canonical_model_back(name):
  free = presets.free()
  canonical, _ = passes.run_chain(
    (free.transform,), cases.load(name).model, rounding=free.rounding
  )
  decoded = rotbits_jax.decode(_encoded(name, 'free'))
  assert decoded.config == canonical.config
  for found, expected in zip(decoded.layers(), canonical.layers(), strict=True):
    _assert_same_bits(found, expected)
  _assert_same_bits(decoded.outer(), canonical.outer())


@pytest.mark.parametrize('name', ALL)
def test_report_adds_up_to_the_byte(name):
  for preset in ('exact', 'free'):
    check_report(cases.load(name).model, _encoded(name, preset))


def check_report(model, data):
  report, tensors = rotbits_jax.inspect(data), checkpoints.to_tensors(model).values()
  assert report.file_bytes == len(data)
  assert report.input_bytes == sum(x.nbytes for x in tensors)
  assert report.input_elements == sum(x.size for x in tensors)
  saved = sum(line.bytes_saved for line in report.lines)
  assert saved == report.input_bytes - report.file_bytes
  numbers = sum(line.elements_saved for line in report.lines)
  assert numbers == report.input_elements - report.stored_elements


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float32])
def test_other_dtypes(dtype):
  model = _cast(cases.load(TINY).model, dtype)
  exact, free = (
    rotbits_jax.decode(rotbits_jax.encode(model, preset=preset))
    for preset in ('exact', 'free')
  )
  _assert_same_bits(exact, model)
  assert free.params['embed']['tokens'].dtype == dtype


@pytest.mark.parametrize('preset', ['exact', 'free'])
def test_encoding_twice_gives_the_same_bytes(preset):
  assert _encoded.__wrapped__(TINY, preset) == _encoded(TINY, preset)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('name', cases.CHECKPOINTS)
def test_free_has_the_function_up_to_twice_the_noise(name, dtype):
  model = _cast(cases.load(name).model, dtype)
  free = rotbits_jax.load(rotbits_jax.encode(model, preset='free'))
  noisy = [passes.randomly_rotated(model, key=jax.random.key(i)) for i in range(3)]
  same, free, *noisy = (
    evaluation.evaluate(x, _tokens(name), reference=model)
    for x in (model, free, *noisy)
  )
  assert free.kl < max(2 * np.mean([x.kl for x in noisy]), 1e-9)
  # If log-probabilities differ by noise, its mean square is twice the divergence.
  noise = np.sqrt(2 * free.kl / free.tokens)
  assert abs(free.perplexity / same.perplexity - 1) < max(0.001, 3 * noise)


# ---- records and layers --------------------------------------------------------------


def test_records_and_tensors_are_read_without_the_others():
  model = rotbits_jax.decode(_encoded(TINY, 'free'))
  data = _flip(_encoded(TINY, 'free'), 'layers.1')
  for i in (0, 2):
    name = f'layers.{i}'
    _assert_same_bits(rotbits_jax.read_record(data, name), {name: model.layer(i)})
  query = model.layer(2)['attention']['query']['kernel']
  found = rotbits_jax.read_tensor(data, 'layers.2/attention/query/kernel')
  _assert_same_bits(found, query)
  for read, name in (
    (rotbits_jax.read_record, 'layers.1'),
    (rotbits_jax.read_record, 'layers.9'),
    (rotbits_jax.read_tensor, 'layers.2/nothing'),
  ):
    with pytest.raises(rotbits_jax.ContainerError, match=name):
      read(data, name)


@pytest.mark.parametrize('preset', ['exact', 'free'])
def test_some_layers_load_without_the_others(preset):
  name = 'opt-small-sliced-0.2'
  data = _flip(_encoded(name, preset), 'layers.0')
  whole = rotbits_jax.decode(_encoded(name, preset))
  model = rotbits_jax.load(data, layers=range(1, 3))
  for layer, i in zip(model.layers(), (1, 2), strict=True):
    _assert_same_bits(layer, whole.layer(i))
  _assert_same_bits(model.outer(), whole.outer())
  with pytest.raises(ValueError, match='layers'):
    rotbits_jax.load(data, layers=range(3, 9))
  with pytest.raises(ValueError, match=r'layers\.0: the model lacks it'):
    rotbits_jax.encode(model, preset=preset)


# ---- sizes ---------------------------------------------------------------------------


def test_trained_checkpoint_shrinks_as_promised():
  name = 'opt-small-sliced-0.2'
  size = rotbits_jax.inspect(_encoded(name, 'exact')).input_bytes
  assert len(_encoded(name, 'exact')) < 0.851 * size
  assert len(_encoded(name, 'free')) < 0.804 * size


@pytest.mark.parametrize('preset', presets.PRESETS)
def test_models_of_noise_are_no_larger_than_plain_storage(preset):
  rng = np.random.default_rng(0)
  bits = lambda x: rng.integers(0, 1 << 16, x.shape).astype(np.uint16)
  noise = jax.tree.map(lambda x: bits(x).view(np.float16), cases.load(TINY).model)
  data = rotbits_jax.encode(noise, preset=preset)
  assert len(data) < rotbits_jax.inspect(data).input_bytes + 10_000


# ---- damage --------------------------------------------------------------------------


def test_flipped_bits_never_give_wrong_weights():
  model = seeds.sliced_model(seeds.LLAMA)
  data = rotbits_jax.encode(checkpoints.Checkpoint(model, seeds.FILES, 'tiny'))
  for position in np.linspace(0, len(data) - 1, 120).astype(int):
    damaged = bytearray(data)
    damaged[position] ^= 1 << position % 8
    with pytest.raises(rotbits_jax.ContainerError):
      rotbits_jax.decode_checkpoint(bytes(damaged))
