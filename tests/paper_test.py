"""The published scheme: decoding inverts encoding, and bits come back."""

import contextlib
import functools
from unittest import mock
import zlib

import chex
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import random_models

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.paper import stack
from rotbits_jax.system import schema
from tests import cases
from tests import transform_checks

TRAINED = 'opt-small-sliced-0.2'
TINY = (
  'llama-tiny-sliced-head-0.25',
  'phi2-tiny-sliced-0.25',
  'phi3-tiny-sliced-0.25',
)
PUBLISHED = {'canonicalizer': 'svd', 'rotation_codec': 'symmetric_eig'}
QWEN3 = random_models.BASE | {
  'model_type': 'qwen3',
  'num_hidden_layers': 2,
  'head_dim': 12,
}


def options(**changes):
  """Returns the options of the preset `paper`, with changes."""
  return schema.load(paper.Options, presets.paper(**changes).options)


def decode(encoded, config, **changes):
  return paper.decode(options(**changes), encoded.layout, encoded.streams, config)


def size(encoded):
  return sum(words.nbytes for words in encoded.streams.values())


def assert_exact(model, **changes):
  """Encodes and decodes a model, and compares the digests."""
  encoded = paper.encode(model, options(**changes))
  decoded = decode(encoded, model.config, **changes)
  given = structured.flatten(model.outer())
  for i, layer in enumerate(model.layers()):
    given |= {f'layers.{i}/{k}': x for k, x in structured.flatten(layer).items()}
  chex.assert_trees_all_equal_shapes_and_dtypes(decoded, given)
  for path, array in decoded.items():
    assert zlib.crc32(array.tobytes()) == encoded.layout.arrays[path].digest, path
  assert len(encoded.saving.notes) == len(model.config.segment_widths)
  return encoded, decoded


SLOW = pytest.mark.slow
CHANGES = [
  {'canonicalizer': 'polar_shortcut'},
  pytest.param({'canonicalizer': 'svd'}, marks=SLOW),
  pytest.param({'canonicalizer': 'qr'}, marks=SLOW),
  pytest.param({'rotation_codec': 'symmetric_eig'}, marks=SLOW),
  pytest.param(PUBLISHED, marks=SLOW),
  pytest.param({'entropy': True}, marks=SLOW),
]


@pytest.mark.parametrize('changes', CHANGES)
def test_decodes_exactly_and_gains(changes):
  model = cases.load(TINY[0]).model
  encoded, _ = assert_exact(model, **changes)
  whole = sum(x.nbytes for x in jax.tree.leaves(model.params))
  if 'entropy' in changes:
    assert size(encoded) < 0.87 * whole
  else:
    assert whole - size(encoded) == pytest.approx(
      encoded.saving.bytes, abs=0.001 * whole
    )
  assert encoded.saving.bytes > 0
  assert encoded.layout.sampled[1]


def sliced(widths=(18,) * 5, dtype=np.float16, shortcut=None):
  return random_models.sliced_llama(widths, jnp.dtype(dtype), shortcut=shortcut)


def spoiled(path, value):
  """Returns a model with one element of layer 0 that is not finite."""
  model = sliced()
  layers = list(model.layers())
  structured.flatten(layers[0])[path][2, 3] = value
  return models.from_layers(model.config, model.outer(), layers)


MODELS = {
  'widening': lambda: sliced([12, 14, 14, 14, 24]),
  'narrowing': lambda: sliced([14, 12, 12, 1, 1]),
  'zero shortcuts': lambda: sliced(shortcut=lambda rng, m: 0 * m),
  'identities': lambda: sliced(shortcut=lambda rng, m: np.eye(*m.shape)),
  'deficient': lambda: sliced(shortcut=lambda rng, m: m[:, :5] @ m[:5]),
  'bfloat16': lambda: sliced(dtype='bfloat16'),
  'float32': lambda: sliced(dtype='float32'),
  'a kernel with NaN': lambda: spoiled('attention/value/kernel', np.nan),
  'a shortcut with NaN': lambda: spoiled('mlp_shortcut/kernel', np.nan),
  'a shortcut with infinity': lambda: spoiled('mlp_shortcut/kernel', np.inf),
  'norms of queries and keys': lambda: random_models.sliced(
    QWEN3, [18, 18, 18, 18, 24], np.float16
  ),
}


@pytest.mark.slow
def test_models(subtests):
  for name, make in MODELS.items():
    with subtests.test(name=name):
      _, decoded = assert_exact(make())
      for path, array in decoded.items():
        if not np.isfinite(array).all():  # such numbers stay where they are
          assert np.argwhere(~np.isfinite(array)).tolist() == [[2, 3]], path


@pytest.mark.slow
def test_polar_shortcut_gives_back_eleven_bits_a_parameter():
  encoded = paper.encode(cases.load(TRAINED).model, options())
  parameters = sum(
    d * (d - 1) // 2 for d in cases.load(TRAINED).model.config.segment_widths
  )
  assert 8 * encoded.saving.bytes / parameters > 11


@pytest.mark.slow
@pytest.mark.parametrize('name', TINY)
def test_every_family_keeps_its_function(name):
  model = cases.load(name).model
  data = rotbits_jax.encode(model, preset='paper')
  report = rotbits_jax.inspect(data)
  assert any(note['found in'] for note in report.notes['rotations'])
  tokens = np.arange(24)[None] % model.config.vocab_size
  rerounded = passes.randomly_rotated(model, key=jax.random.key(0))
  reference, other, found = (
    transform_checks.fast_logits(x, tokens)
    for x in (model, rerounded, rotbits_jax.decode(data))
  )
  assert np.abs(found - reference).mean() < 2 * np.abs(other - reference).mean()


def decode_elsewhere(canonicalizer, error):
  """Decodes with a backward error of this many roundoffs, drawn at random."""

  def shortcut(rng, matrix):  # with singular values from 1 down to 0.001
    u, _, vt = np.linalg.svd(matrix)
    return u * np.geomspace(1, 1e-3, len(u)) @ vt

  model = sliced((24,) * 5, np.float32, shortcut)
  encoded = paper.encode(model, options(canonicalizer=canonicalizer))
  assert any(encoded.layout.sampled)
  recovered = functools.partial(rotations.recovered, disturb=True)
  with contextlib.ExitStack() as patches:
    for name, value in (
      ('_BACKWARD_ERROR', error * 2.0**-24),
      ('_NOISE', 7),
      ('recovered', recovered),
    ):
      patches.enter_context(mock.patch.object(rotations, name, value))
    decode(encoded, model.config, canonicalizer=canonicalizer)


@pytest.mark.parametrize('canonicalizer', ['polar_shortcut', 'qr', 'svd'])
def test_other_rounding_errors_are_within_the_margin(canonicalizer):
  decode_elsewhere(canonicalizer, error=8)


def test_errors_beyond_the_margin_are_noticed():
  with pytest.raises(ValueError, match='beyond the margin'):
    decode_elsewhere('polar_shortcut', error=1e5)


def words_of(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 1 << 16, count).astype(np.uint16)


def test_words_come_back_from_a_stack():
  words = stack.WordStack(words_of(10))
  words.push(words_of(5, 1))
  expected = np.concatenate([words_of(10)[8:], words_of(5, 1)])
  np.testing.assert_array_equal(words.pop(7), expected)
  np.testing.assert_array_equal(words.pop(words.size), words_of(10)[:8])
  with pytest.raises(ValueError, match='ran dry'):
    words.pop(1)


@functools.cache
def encoded_model(entropy=False):
  model = sliced((14,) * 5)
  return model, paper.encode(model, options(entropy=entropy))


def changed_array(layout, path, **fields):
  array = msgspec.structs.replace(layout.arrays[path], **fields)
  return msgspec.structs.replace(layout, arrays=layout.arrays | {path: array})


def without_head(layout):
  arrays = {k: x for k, x in layout.arrays.items() if k != 'head/kernel'}
  return msgspec.structs.replace(layout, arrays=arrays)


LAYOUTS = {
  'fixed': lambda x: msgspec.structs.replace(x, fixed=15),
  'sampled': lambda x: msgspec.structs.replace(x, sampled=x.sampled[1:]),
  'missing': without_head,
  'empty': lambda x: msgspec.structs.replace(x, arrays={}),
  'wider': lambda x: changed_array(x, 'head/kernel', dtype='float32'),
  'digest': lambda x: changed_array(x, 'layers.1/mlp/up/kernel', digest=1),
}
STREAMS = (
  ('message', lambda x: x[1:]),
  ('message', lambda x: x[:-1]),
  ('message', lambda x: x[:0]),
  ('message', lambda x: np.append(x, x)),
  ('corrections', lambda x: x[1:]),
  ('corrections', lambda x: x[:-3]),
  ('corrections', lambda x: x[:0]),
)


@pytest.mark.parametrize('entropy', [False, True])
def test_malformed_layouts_and_streams_are_refused(entropy, subtests):
  model, encoded = encoded_model(entropy)
  changed = [encoded._replace(layout=x(encoded.layout)) for x in LAYOUTS.values()]
  for name, change in STREAMS:
    streams = encoded.streams | {name: change(encoded.streams[name])}
    changed.append(encoded._replace(streams=streams))
  for number, wrong in enumerate(changed):
    with subtests.test(number=number), pytest.raises(ValueError, match=r'\w'):
      decode(wrong, model.config, entropy=entropy)


def test_a_rotation_that_the_arrays_cannot_give_is_refused_at_once():
  model, encoded = encoded_model()
  config = msgspec.structs.replace(
    model.config,
    hidden_size=40_000,
    num_layers=1,
    vocab_size=1,
    parallel_block=True,
    segment_widths=(40_000, 1),
  )
  paths = [path for part in segments.shapes(config) for path in part.all]
  layout = msgspec.structs.replace(
    encoded.layout,
    fixed=0,
    sampled=(True, False),
    coders=encoded.layout.coders[:1],
    arrays=dict.fromkeys(paths, encoded.layout.arrays['head/kernel']),
  )
  with pytest.raises(ValueError, match='too small for a rotation'):
    decode(encoded._replace(layout=layout), config)
