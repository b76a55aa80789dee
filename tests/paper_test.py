"""The published scheme: what is decoded is what was encoded, and bits come back."""

import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest
import random_models

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import symmetries
from rotbits_jax.coding import rans
from rotbits_jax.presets import paper

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
TRAINED = 'opt-small-sliced-0.2'
TINY = (
  'llama-tiny-sliced-head-0.25',
  'phi2-tiny-sliced-0.25',
  'phi3-tiny-sliced-0.25',
)


@functools.cache
def _load(name):
  return checkpoints.load_checkpoint(TESTDATA / name).model


def _encode(model, **settings):
  settings = rotbits_jax.Settings(**settings)
  return rotbits_jax.encode(model, preset='paper', settings=settings)


def _notes(data):
  return rotbits_jax.inspect(data).notes['rotations']


def _logits(model, tokens):
  fast_compile = {'xla_backend_optimization_level': 0}
  return np.asarray(
    jax.jit(models.logits, compiler_options=fast_compile)(model, tokens)
  )


class SchemeTestCase(parameterized.TestCase):
  def _assert_exact(self, model, options):
    encoded = paper.encode(model, options)
    decoded = paper.decode(encoded.layout, encoded.streams, model.config.segment_widths)
    self.assertEqual(set(decoded), set(encoded.arrays))
    for path, array in encoded.arrays.items():
      self.assertEqual(array.tobytes(), decoded[path].tobytes(), path)
      self.assertEqual(array.dtype, decoded[path].dtype)
    return encoded

  def _assert_same_function(self, data, model):
    tokens = np.arange(24)[None] % model.config.vocab_size
    reference = _logits(model, tokens)
    rerounded = symmetries.randomly_rotated(model, key=jax.random.key(0))
    noise = np.abs(_logits(rerounded, tokens) - reference).mean()
    error = np.abs(_logits(rotbits_jax.decode(data), tokens) - reference).mean()
    self.assertLess(error, 2 * noise)

  def check_decodes_exactly_and_gains(self, canonicaliser):
    model = _load(TINY[0])
    encoded = self._assert_exact(model, paper.Options(canonicaliser))
    self.assertEqual(encoded.layout['sampled'], [True] * 7)
    size = sum(stream.nbytes for stream in encoded.streams.values())
    whole = symmetries.count(model)[1]
    self.assertAlmostEqual(whole - size, encoded.net_bits / 8, delta=0.001 * whole)


class SchemeTest(SchemeTestCase):
  def test_polar_shortcut_decodes_exactly_and_gains(self):
    self.check_decodes_exactly_and_gains('polar_shortcut')


@pytest.mark.slow
class SlowSchemeTest(SchemeTestCase):
  @parameterized.parameters('svd', 'qr')
  def test_other_canonicalisers_decode_exactly_and_gain(self, canonicaliser):
    self.check_decodes_exactly_and_gains(canonicaliser)

  def test_rotations_that_cannot_be_recovered_are_not_sampled(self):
    zero = lambda rng, m: 0 * m
    model = random_models.sliced_llama([18] * 5, np.float16, shortcut=zero)
    encoded = paper.encode(model, paper.Options())
    self.assertEqual(encoded.layout['sampled'][1:], [False] * 4)

  def test_entropy_coding_gains_on_top(self):
    model = _load(TINY[0])
    encoded = self._assert_exact(model, paper.Options(entropy=True))
    plain = paper.encode(model, paper.Options())
    size = lambda e: sum(stream.nbytes for stream in e.streams.values())
    self.assertLess(size(encoded), 0.87 * size(plain))

  def test_published_threshold_decodes_to_what_encode_reports(self):
    settings = {'canonicaliser': 'svd', 'rotation_codec': 'symmetric_eig'}
    data = _encode(_load(TINY[0]), **settings, correction='threshold', threshold=1e-3)
    exact = _encode(_load(TINY[0]), **settings)
    self.assertLess(len(data), len(exact))
    # `decode` checks digests of the model that `encode` simulated.
    decoded, rotated = rotbits_jax.decode(data), rotbits_jax.decode(exact)
    errors = [
      np.abs(np.float32(a) - np.float32(b)).max()
      for a, b in zip(jax.tree.leaves(decoded), jax.tree.leaves(rotated), strict=True)
    ]
    self.assertGreater(max(errors), 0)
    self.assertLess(max(errors), 0.1)

  @parameterized.named_parameters(
    ('widening', [12, 14, 14, 14, 24]),
    ('narrowing', [14, 12, 12, 1, 1]),
  )
  def test_widths_may_vary(self, widths):
    model = random_models.sliced_llama(widths, np.float16)
    self._assert_exact(model, paper.Options())

  def test_numbers_that_are_not_finite_stay_where_they_are(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    layers = list(model.layers())
    layers[1]['attention']['value']['kernel'][2, 3] = np.nan
    broken = models.from_layers(model.config, model.outer(), layers)
    encoded = self._assert_exact(broken, paper.Options())
    self.assertFalse(encoded.layout['sampled'][2])
    kernel = encoded.arrays['layers.1/attention/value/kernel']
    self.assertEqual(np.argwhere(np.isnan(kernel)).tolist(), [[2, 3]])

  def test_polar_shortcut_gives_back_eleven_bits_a_parameter(self):
    encoded = paper.encode(_load(TRAINED), paper.Options())
    widths = _load(TRAINED).config.segment_widths
    parameters = sum(d * (d - 1) // 2 for d in widths)
    self.assertGreater(encoded.net_bits / parameters, 11)

  @parameterized.parameters(*TINY)
  def test_every_family_keeps_its_function(self, name):
    data = _encode(_load(name))
    self.assertTrue(any(note['found in'] for note in _notes(data)))
    self._assert_same_function(data, _load(name))

  @parameterized.parameters('svd', 'polar_shortcut')
  def test_published_rotation_code_decodes_exactly(self, canonicaliser):
    options = paper.Options(canonicaliser, 'symmetric_eig')
    encoded = self._assert_exact(_load(TINY[0]), options)
    self.assertGreater(encoded.net_bits, 0)

  @parameterized.named_parameters(
    ('zero', lambda rng, m: 0 * m),
    ('identity', lambda rng, m: np.eye(*m.shape)),
    ('deficient', lambda rng, m: m[:, :5] @ m[:5]),
  )
  def test_degenerate_shortcuts(self, shortcut):
    model = random_models.sliced_llama([18] * 5, np.float16, shortcut=shortcut)
    encoded = self._assert_exact(model, paper.Options())
    self.assertLen(encoded.notes, 5)

  @parameterized.parameters('bfloat16', 'float32')
  def test_other_formats(self, dtype):
    model = random_models.sliced_llama([18] * 5, jax.numpy.dtype(dtype))
    for entropy in (False, True):
      self._assert_exact(model, paper.Options(entropy=entropy))

  def test_same_bits_without_jit(self):
    model = random_models.sliced_llama([3, 3, 3], np.float16)
    encoded = paper.encode(model, paper.Options())
    with jax.disable_jit():
      decoded = paper.decode(encoded.layout, encoded.streams, (3, 3, 3))
    for path, array in encoded.arrays.items():
      self.assertEqual(array.tobytes(), decoded[path].tobytes(), path)


class FileTest(parameterized.TestCase):
  def test_report_adds_up_and_lists_every_segment(self):
    data = _encode(_load(TINY[0]))
    report = rotbits_jax.inspect(data)
    saved = sum(source.bytes_saved for source in report.sources)
    self.assertEqual(saved, report.input_bytes - report.file_bytes)
    notes = _notes(data)
    self.assertLen(notes, len(_load(TINY[0]).config.segment_widths))
    for note in notes:
      self.assertEqual(note['net'], round(note['net']))
      self.assertAlmostEqual(note['net'], note['popped'] - note['correction'], delta=1)

  def test_damage_is_an_error(self):
    data = _encode(_load(TINY[0]))
    for position in np.linspace(5000, len(data) - 1, 25).astype(int):
      damaged = bytearray(data)
      damaged[position] ^= 16
      with self.assertRaises(rotbits_jax.ContainerError):
        rotbits_jax.decode(bytes(damaged))

  def test_a_message_that_runs_dry_says_so(self):
    model = _load(TINY[0])
    encoded = paper.encode(model, paper.Options())
    layout = encoded.layout | {
      'parts': encoded.layout['parts'] + encoded.layout['parts'][-1:]
    }
    layout['sampled'] = [*layout['sampled'], False]
    with self.assertRaisesRegex(rans.MessageError, 'bits were missing'):
      paper.decode(layout, encoded.streams, (*model.config.segment_widths, 96))

  def test_dense_models_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'dense'):
      _encode(_load('llama-tiny-dense'))

  def test_settings_that_do_not_go_together_are_refused(self):
    for wrong in (
      {'canonicaliser': 'lu'},
      {'correction': 'threshold'},
      {'correction': 'threshold', 'rotation_codec': 'symmetric_eig', 'entropy': True},
    ):
      with self.assertRaises(ValueError):
        rotbits_jax.Settings(**wrong)


if __name__ == '__main__':
  absltest.main()
