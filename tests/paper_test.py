"""The published scheme: decoding inverts encoding, and bits come back."""

import contextlib
import functools
import json
import pathlib
from unittest import mock
import zlib

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np
import pytest
import random_models

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import memory
from rotbits_jax.paper import decoder
from rotbits_jax.paper import rotations
from rotbits_jax.system import schema
from tests import transform_checks

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
TRAINED = 'opt-small-sliced-0.2'
QWEN3 = random_models.BASE | {
  'model_type': 'qwen3',
  'num_hidden_layers': 2,
  'head_dim': 12,
}
TINY = (
  'llama-tiny-sliced-head-0.25',
  'phi2-tiny-sliced-0.25',
  'phi3-tiny-sliced-0.25',
)


@functools.cache
def _load(name):
  return checkpoints.load_checkpoint(TESTDATA / name).model


def _encode(model, **options):
  return rotbits_jax.encode(model, preset='paper', **options)


def _notes(data):
  return rotbits_jax.inspect(data).notes['rotations']


def options(**changes):
  """Returns the options of the preset `paper`, with changes."""
  return schema.load(paper.Options, presets.paper(**changes).options)


def _size(encoded, message):
  return message.nbytes + encoded.streams['corrections'].nbytes


def _logits(model, tokens):
  fast_compile = {'xla_backend_optimization_level': 0}
  return np.asarray(
    jax.jit(models.logits, compiler_options=fast_compile)(model, tokens)
  )


def encode(model, **changes):
  """Returns the result of `paper.encode`, and the message."""
  words = [np.zeros(0, np.uint16)]
  spill = lambda x: words.append(np.array(x))
  encoded = paper.encode(model, options(**changes), spill)
  return encoded, np.concatenate(words)


def decode(encoded, message, config, **changes):
  layout = json.loads(json.dumps(encoded.layout))
  streams = {'message': message, **encoded.streams}
  return dict(paper.decode(options(**changes), layout, streams, config))


def digests(encoded):
  return {path: digest for path, (_, digest) in encoded.layout['arrays'].items()}


class SchemeTestCase(parameterized.TestCase):
  def _assert_exact(self, model, **changes):
    """Encodes and decodes a model, and compares the digests."""
    encoded, message = encode(model, **changes)
    decoded = decode(encoded, message, model.config, **changes)
    self.assertEqual(set(decoded), set(digests(encoded)))
    given = structured.flatten(model.outer())
    for i, layer in enumerate(model.layers()):
      given |= {f'layers.{i}/{k}': x for k, x in structured.flatten(layer).items()}
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, given)
    for path, array in decoded.items():
      self.assertEqual(zlib.crc32(array.tobytes()), digests(encoded)[path], path)
    self.assertLen(encoded.saving.notes, len(model.config.segment_widths))
    return encoded, message, decoded

  def _assert_same_function(self, data, model):
    tokens = np.arange(24)[None] % model.config.vocab_size
    reference = _logits(model, tokens)
    rerounded = passes.randomly_rotated(model, key=jax.random.key(0))
    noise = np.abs(_logits(rerounded, tokens) - reference).mean()
    error = np.abs(_logits(rotbits_jax.decode(data), tokens) - reference).mean()
    self.assertLess(error, 2 * noise)

  def check_decodes_exactly_and_gains(self, canonicalizer):
    model = _load(TINY[0])
    encoded, message, _ = self._assert_exact(model, canonicalizer=canonicalizer)
    self.assertTrue(all(encoded.layout['sampled']))
    whole = sum(x.nbytes for x in jax.tree.leaves(model.params))
    saved = whole - _size(encoded, message)
    self.assertAlmostEqual(saved, encoded.saving.bytes, delta=0.001 * whole)


class SchemeTest(SchemeTestCase):
  def test_polar_shortcut_decodes_exactly_and_gains(self):
    self.check_decodes_exactly_and_gains('polar_shortcut')


class MarginTest(SchemeTestCase):
  """Another machine's factorisation differs by a backward error, drawn at random."""

  def decode_elsewhere(self, model, canonicalizer, error):
    """Encodes here, and decodes with a backward error of this many roundoffs."""
    encoded, message = encode(model, canonicalizer=canonicalizer)
    self.assertTrue(any(encoded.layout['sampled']))
    real = rotations.recovered

    def recovered(*args):
      return real(*args, disturb=True)

    elsewhere = (
      absltest.mock.patch.object(rotations, '_BACKWARD_ERROR', error * 2.0**-24),
      absltest.mock.patch.object(rotations, '_NOISE', 7),
      absltest.mock.patch.object(rotations, 'recovered', recovered),
    )
    with contextlib.ExitStack() as stack:
      for patch in elsewhere:
        stack.enter_context(patch)
      decoded = decode(encoded, message, model.config, canonicalizer=canonicalizer)
    for path, array in decoded.items():
      self.assertEqual(zlib.crc32(array.tobytes()), digests(encoded)[path], path)

  def model(self, dtype):
    """A model whose shortcuts have singular values from 1 down to 0.001."""

    def shortcut(rng, matrix):
      u, _, vt = np.linalg.svd(matrix)
      return u * np.geomspace(1, 1e-3, len(u)) @ vt

    return random_models.sliced_llama((24,) * 5, dtype, shortcut=shortcut)

  @parameterized.parameters('polar_shortcut', 'qr', 'svd')
  def test_other_rounding_errors_are_within_the_margin(self, canonicalizer):
    self.decode_elsewhere(self.model(np.float32), canonicalizer, error=8)

  def test_errors_beyond_the_margin_are_noticed(self):
    with self.assertRaisesRegex(ValueError, 'beyond the margin'):
      self.decode_elsewhere(self.model(np.float32), 'polar_shortcut', error=1e5)


@pytest.mark.slow
class SlowSchemeTest(SchemeTestCase):
  @parameterized.parameters('svd', 'qr')
  def test_other_canonicalizers_decode_exactly_and_gain(self, canonicalizer):
    self.check_decodes_exactly_and_gains(canonicalizer)

  def test_rotations_that_cannot_be_recovered_are_not_sampled(self):
    zero = lambda rng, m: 0 * m
    model = random_models.sliced_llama([18] * 5, np.float16, shortcut=zero)
    encoded, _ = encode(model)
    self.assertEqual(encoded.layout['sampled'][1:], [False] * 4)

  def test_entropy_coding_gains_on_top(self):
    model = _load(TINY[0])
    encoded, message, _ = self._assert_exact(model, entropy=True)
    plain = _size(*encode(model))
    self.assertLess(_size(encoded, message), 0.87 * plain)

  @pytest.mark.daily
  def test_published_threshold_leaves_errors_below_it_in(self):
    model = _load(TINY[0])
    published = {'canonicalizer': 'svd', 'rotation_codec': 'symmetric_eig'}
    exact, message, rotated = self._assert_exact(model, **published)
    lossy, shorter, decoded = self._assert_exact(
      model, **published, correction='threshold'
    )
    self.assertLess(_size(lossy, shorter), _size(exact, message))
    # Both sample the same rotations, except perhaps for the last segment, because its
    # rotation may save nothing.
    sampled = [x.layout['sampled'] for x in (exact, lossy)]
    self.assertEqual(sampled[0][:-1], sampled[1][:-1])
    last = paper.segments.parts(model.config)[-1].all
    differs = last if sampled[0][-1] != sampled[1][-1] else {}
    errors = [
      np.abs(np.float32(array) - np.float32(rotated[path])).max()
      for path, array in decoded.items()
      if path not in differs
    ]
    self.assertGreater(max(errors), 0)
    self.assertLess(max(errors), 2e-3)  # errors of several segments add up

  @parameterized.named_parameters(
    ('widening', [12, 14, 14, 14, 24]),
    ('narrowing', [14, 12, 12, 1, 1]),
  )
  def test_widths_may_vary(self, widths):
    model = random_models.sliced_llama(widths, np.float16)
    self._assert_exact(model)

  def test_numbers_that_are_not_finite_stay_where_they_are(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    layers = list(model.layers())
    layers[1]['attention']['value']['kernel'][2, 3] = np.nan
    broken = models.from_layers(model.config, model.outer(), layers)
    encoded, _, decoded = self._assert_exact(broken)
    self.assertFalse(encoded.layout['sampled'][2])
    kernel = decoded['layers.1/attention/value/kernel']
    self.assertEqual(np.argwhere(np.isnan(kernel)).tolist(), [[2, 3]])

  @parameterized.parameters(np.nan, np.inf)
  def test_a_shortcut_that_is_not_finite_stays_where_it_is(self, value):
    model = random_models.sliced_llama([18] * 5, np.float16)
    layers = list(model.layers())
    layers[0]['mlp_shortcut']['kernel'][2, 3] = value
    broken = models.from_layers(model.config, model.outer(), layers)
    encoded, _, decoded = self._assert_exact(broken)
    self.assertEqual(encoded.layout['sampled'][1:3], [False, False])
    kernel = decoded['layers.0/mlp_shortcut/kernel']
    self.assertEqual(np.argwhere(~np.isfinite(kernel)).tolist(), [[2, 3]])

  def test_polar_shortcut_gives_back_eleven_bits_a_parameter(self):
    encoded, _ = encode(_load(TRAINED))
    widths = _load(TRAINED).config.segment_widths
    parameters = sum(d * (d - 1) // 2 for d in widths)
    self.assertGreater(8 * encoded.saving.bytes / parameters, 11)

  @parameterized.parameters(*TINY)
  def test_every_family_keeps_its_function(self, name):
    data = _encode(_load(name))
    self.assertTrue(any(note['found in'] for note in _notes(data)))
    self._assert_same_function(data, _load(name))

  @parameterized.parameters('svd', 'polar_shortcut')
  def test_published_rotation_code_decodes_exactly(self, canonicalizer):
    encoded, _, _ = self._assert_exact(
      _load(TINY[0]), canonicalizer=canonicalizer, rotation_codec='symmetric_eig'
    )
    self.assertGreater(encoded.saving.bytes, 0)

  @parameterized.named_parameters(
    ('zero', lambda rng, m: 0 * m),
    ('identity', lambda rng, m: np.eye(*m.shape)),
    ('deficient', lambda rng, m: m[:, :5] @ m[:5]),
  )
  def test_degenerate_shortcuts(self, shortcut):
    model = random_models.sliced_llama([18] * 5, np.float16, shortcut=shortcut)
    self._assert_exact(model)

  @parameterized.parameters('bfloat16', 'float32')
  def test_other_formats(self, dtype):
    model = random_models.sliced_llama([18] * 5, jax.numpy.dtype(dtype))
    for entropy in (False, True):
      self._assert_exact(model, entropy=entropy)

  def test_same_bits_without_jit(self):
    model = random_models.sliced_llama([3, 3, 3], np.float16)
    encoded, message = encode(model)
    with jax.disable_jit():
      # `decode` checks the digests.
      self.assertLen(decode(encoded, message, model.config), len(digests(encoded)))


class FileTest(parameterized.TestCase):
  def test_report_adds_up_and_lists_every_segment(self):
    data = _encode(_load(TINY[0]))
    report = rotbits_jax.inspect(data)
    saved = sum(line.bytes_saved for line in report.lines)
    self.assertEqual(saved, report.input_bytes - report.file_bytes)
    notes = _notes(data)
    self.assertLen(notes, len(_load(TINY[0]).config.segment_widths))
    for note in notes:
      self.assertEqual(note['net'], round(note['net']))
      self.assertAlmostEqual(note['net'], note['popped'] - note['correction'], delta=1)

  def test_norms_of_queries_and_keys_come_back(self):
    model = random_models.sliced(QWEN3, [18, 18, 18, 18, 24], np.float16)
    found = rotbits_jax.decode(_encode(model))
    for norm in ('query_norm', 'key_norm'):
      for i in range(2):
        own = [x.layer(i)['attention'][norm]['scale'] for x in (model, found)]
        np.testing.assert_array_equal(*own)
    tokens = np.arange(8)[None]
    expected = transform_checks.fast_logits(model, tokens)
    actual = transform_checks.fast_logits(found, tokens)
    self.assertLess(np.abs(actual - expected).max(), 0.02 * np.abs(expected).max())

  def test_damage_is_an_error(self):
    data = _encode(_load(TINY[0]))
    for position in np.linspace(5000, len(data) - 1, 25).astype(int):
      damaged = bytearray(data)
      damaged[position] ^= 16
      with self.assertRaises(rotbits_jax.ContainerError):
        rotbits_jax.decode(bytes(damaged))

  def test_a_lack_of_memory_is_an_error(self):
    data = _encode(random_models.sliced_llama([3, 3, 3], np.float16))
    of_jax = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
    for error in (MemoryError, of_jax):
      with (
        mock.patch.object(decoder, '_decode', side_effect=error),
        self.assertRaisesRegex(rotbits_jax.ContainerError, 'more than memory holds'),
      ):
        rotbits_jax.decode(data)

  def test_rotations_count_as_memory(self):
    data = _encode(random_models.sliced_llama([3, 3, 3], np.float16))
    with mock.patch.object(memory, 'check') as check:
      model = rotbits_jax.decode(data)
    largest = max(sum(x.size for x in jax.tree.leaves(y)) for y in model.layers())
    (nbytes,) = [x.args[1] for x in check.call_args_list if x.args[0] == 'message']
    self.assertGreater(nbytes, 4 * largest + 3 * 3 * 4)

  def test_what_cannot_be_coded_is_refused(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    outer = model.outer()
    integers = jax.tree.map(lambda x: x.astype(np.int16), outer)
    narrow = outer | {'head': {'kernel': outer['head']['kernel'][:, 1:]}}
    missing = {'embed': outer['embed']}
    layers = list(model.layers())
    for name, wrong in (
      ('integers', integers),
      ('the config tells', narrow),
      ('an array is needed', missing),
    ):
      broken = models.from_layers(model.config, wrong, layers)
      with self.subTest(name), self.assertRaises(ValueError):
        encode(broken)
    with self.assertRaisesRegex(ValueError, 'dense'):
      encode(_load('llama-tiny-dense'))

  def test_options_that_do_not_go_together_are_refused(self):
    for changes in (
      {'canonicalizer': 'lu'},
      {'rotation_codec': ['haar']},
      {'entropy': 2},
      {'correction': 'threshold'},
      {'correction': 'threshold', 'rotation_codec': 'symmetric_eig', 'entropy': True},
      {'threshold': float('nan')},
      {'threshold': -1.0},
    ):
      with self.subTest(changes=changes), self.assertRaises(ValueError):
        options(**changes)


if __name__ == '__main__':
  absltest.main()
