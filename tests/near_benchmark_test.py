"""The benchmark of `near` beside block formats and int8."""

import functools
from xml.etree import ElementTree

import numpy as np
import pytest
import random_models

from rotbits_jax import evaluation
from rotbits_jax import structured
from rotbits_jax.presets import steps as steps_lib

gguf = pytest.importorskip('gguf')
near = pytest.importorskip('benchmarks.near')
formats = pytest.importorskip('benchmarks.formats')

ROWS = [
  near.Row(near.PLAIN, '2^-6', 500, 20.0, 1e-5, 0.99),
  near.Row(near.PLAIN, '2^-4', 300, 20.1, 1e-3, 0.99),
  near.Row(near.CALIBRATED, '2^-6', 480, 20.0, 1e-5, 0.99),
  near.Row(near.CALIBRATED, '2^-4', 280, 20.1, 5e-4, 0.99),
  near.Row(near.GGUF, 'Q8_0', 532, 20.0, 1e-4, 0.99),
  near.Row(near.GGUF, 'Q4_K', 282, 20.5, 9e-4, 0.99),
  near.Row(near.ROWS, 'int8', 501, 20.0, 1e-4, 0.99),
]


@functools.cache
def _model():
  return random_models.sliced_llama((16, 16, 16, 16, 24), np.float16)


def _pairs(model):
  for (path, a), (other, b) in zip(_model().leaves(), model.leaves(), strict=True):
    assert path == other
    yield path, np.float32(a), np.float32(b)


@pytest.mark.parametrize(
  ('name', 'bits'),
  [
    ('Q8_0', 8.5),
    ('Q6_K', 6.5625),
    ('Q5_K', 5.5),
    ('Q4_K', 4.5),
    ('IQ4_NL', 4.5),
    ('IQ4_XS', 4.25),
    ('Q3_K', 3.4375),
  ],
)
def test_blocks_take_the_stated_bits_and_round_by_at_most_a_step(name, bits):
  stored = formats.in_blocks(_model(), name)
  length, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
  expected = 0.0
  for path, a, b in _pairs(stored.model):
    if a.ndim < 2:
      np.testing.assert_array_equal(a, b, err_msg=path)
      expected += 2 * a.size
    else:
      expected += np.ceil(a.size / length) * length * bits / 8
      span = 2 * np.abs(a).max()
      assert 0 < np.abs(a - b).max() <= 1.01 * span / 2 ** int(bits - 0.5), path
  assert stored.bytes == expected


def test_blocks_meet_the_inputs_of_one_output():
  model = _model()
  # A column of large numbers must not coarsen the others, because it is a block itself.
  kernel = np.full((32, 4), 1e-3, np.float16)
  kernel[:, 1] = 1.0
  flat = structured.flatten(model.params) | {'head/kernel': kernel}
  changed = type(model)(structured.unflatten(flat), {}, model.config)
  rounded = formats.in_blocks(changed, 'Q4_0').model.params['head']['kernel']
  np.testing.assert_allclose(rounded, kernel, rtol=0.01)


def test_rows_have_a_scale_each():
  for path, a, b in _pairs(formats.in_rows(_model(), 8).model):
    if a.ndim > 1:
      axis = 0 if path.endswith('/kernel') else 1
      greatest = np.abs(a).max(axis=axis, keepdims=True)
      # Half a step, and the rounding of the scale to float16.
      assert np.all(np.abs(a - b) <= (0.5 + 127 / 2**11) * greatest / 127), path


def test_watersic_has_smaller_errors_of_the_outputs_at_fewer_bits():
  tokens = np.random.default_rng(0).integers(0, _model().config.vocab_size, 256)
  inputs = near.inputs_of(_model(), tokens)
  found = formats.like_watersic(_model(), -2.0, inputs)
  plain = formats.like_watersic(_model(), -2.0, {})
  steps = sum(2 * len(own.moments) for own in inputs.values())
  assert found.bytes - steps < plain.bytes
  kl = evaluation.compare(
    {'found': found.model, 'plain': plain.model}, tokens, {'model': _model()}
  )
  assert kl['found'].kl['model'] < 0.9 * kl['plain'].kl['model']


def test_bytes_are_interpolated_in_the_logarithm():
  assert near.bytes_at(ROWS, near.PLAIN, 1e-4) == pytest.approx(400)
  assert near.bytes_at(ROWS, near.PLAIN, 1e-3) == pytest.approx(300)
  assert near.bytes_at(ROWS, near.CALIBRATED, 9e-4) is None


def test_table_has_the_ratio_at_the_same_divergence():
  lines = near.to_text(ROWS, 1000).splitlines()
  assert lines[5].split()[-2:] == ['0.752', '0.681']
  assert lines[6].split()[-1] == '1.080'  # the calibrated steps do not reach so far


def test_picture_names_every_series_and_block_format():
  picture = ElementTree.fromstring(near.picture(ROWS, 1000))
  words = {text.text for text in picture.iter('{http://www.w3.org/2000/svg}text')}
  assert {near.PLAIN, near.CALIBRATED, near.GGUF, near.ROWS, 'Q8_0', 'Q4_K'} <= words
  assert 'prefers-color-scheme: dark' in near.picture(ROWS, 1000)


@pytest.mark.slow
def test_measures_every_way_to_store():
  tokens = np.random.default_rng(0).integers(0, _model().config.vocab_size, 64)
  found = steps_lib.Calibration({'head/kernel': -1.0}, {}, {})
  rows = near.measure(_model(), tokens, found, {}, [-6.0, -3.0])
  assert [row.series for row in rows].count(near.PLAIN) == 2
  assert len(rows) == 4 * 2 + len(near.BLOCKS) + len(near.WIDTHS)
  assert all(row.kl > 0 and row.bytes > 0 for row in rows)
  assert rows[0].kl < rows[1].kl
  assert rows[0].bytes > rows[1].bytes
