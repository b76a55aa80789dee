"""`free` and `near` are never larger than `exact`, see `file.prices`."""

import functools
import pathlib

import ml_dtypes
import numpy as np
import pytest

from benchmarks import quantised
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.file import estimate
from rotbits_jax.file import prices

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
ROTATED, ALONE = 'llama-tiny-dense', 'phi2-tiny-dense'
BF16 = ml_dtypes.bfloat16
MORE = 1000  # bytes
INT4 = quantised.through((1, 32), quantised.integers(7), 7)


@functools.cache
def checkpoint(name, only='', dtype=BF16, function=INT4):
  """Loads a checkpoint whose matrices on some paths were quantised."""

  def change(path, array):
    array = np.asarray(array, np.float32)
    is_matrix = array.ndim > 1 and min(array.shape[-2:]) > 32
    if is_matrix and only in path:
      rows = array if 'tokens' in path else array.swapaxes(-1, -2)
      changed = function(np.ascontiguousarray(rows).reshape(-1, rows.shape[-1]))
      changed = changed.reshape(rows.shape)
      array = changed if 'tokens' in path else changed.swapaxes(-1, -2)
    return np.ascontiguousarray(array).astype(dtype)

  loaded = checkpoints.load_checkpoint(TESTDATA / name)
  params = structured.flatten(loaded.model.params)
  params = {path: change(path, array) for path, array in params.items()}
  model = loaded.model.replace(params=structured.unflatten(params), stored_as=None)
  return checkpoints.Checkpoint(model, loaded.files, loaded.stem)


def check(source, preset, **options):
  """Compares the file with that of `exact`; returns both, and the report."""
  exact = rotbits_jax.encode(source, preset='exact')
  data = rotbits_jax.encode(source, preset=preset, **options)
  assert len(data) <= len(exact) + MORE
  return exact, data, rotbits_jax.inspect(data)


def same(source, data):
  """Returns whether all bits of a model come back."""
  decoded = rotbits_jax.decode(data)
  return structured.same_bits(dict(decoded.leaves()), dict(source.model.leaves()))


@pytest.mark.parametrize('name', [ROTATED, ALONE])
@pytest.mark.parametrize('preset', ['free', 'near'])
def test_a_model_that_was_quantised_is_stored_as_exact_stores_it(name, preset):
  source = checkpoint(name)
  _, data, report = check(source, preset)
  assert same(source, data)
  assert (report.preset, report.keeps) == (preset, 'bits')


@pytest.mark.parametrize('name', [ROTATED, ALONE])
def test_the_report_says_which_records_are_stored_so(name):
  _, _, report = check(checkpoint(name), 'free')
  assert 'layers.0' in report.kept_records
  assert report.records >= len(report.kept_records)
  (remark,) = report.remarks()
  count = f'{len(report.kept_records)} of {report.records} records'
  assert 'all their bits are kept' in remark
  assert count in remark
  assert report.to_json()['remarks'] == [remark]
  assert count in ' '.join(report.to_text().split())


def test_free_keeps_the_codes_of_arrays_that_it_does_not_change():
  source = checkpoint(ALONE, 'mlp')
  exact, data, report = check(source, 'free')
  assert len(data) < len(exact) + 200
  assert report.keeps == 'function'
  quantised_paths = {x['tensor'] for x in report.notes['quantised before']}
  for path in ('layers.0/mlp/up/kernel', 'layers.1/mlp/down/kernel'):
    assert path in report.kept_tensors or path.split('/')[0] in report.kept_records
    assert path in quantised_paths
  decoded = dict(rotbits_jax.decode(data).leaves())
  for path, array in source.model.leaves():
    if '/mlp/' in path and array.ndim > 1:
      assert structured.same_bits(decoded[path], array), path


def test_verify_of_a_model_that_is_kept_in_part(tmp_path):
  rotbits_jax.save_checkpoint(checkpoint(ALONE, 'mlp'), tmp_path / 'model')
  rotbits_jax.encode_to_file(tmp_path / 'model', tmp_path / 'file', preset='free')
  assert rotbits_jax.verify(tmp_path / 'file', against=tmp_path / 'model').kl < 1e-4


def test_verify_compares_all_bits_of_a_model_that_is_kept(tmp_path):
  rotbits_jax.save_checkpoint(checkpoint(ROTATED), tmp_path / 'model')
  rotbits_jax.encode_to_file(tmp_path / 'model', tmp_path / 'file', preset='free')
  assert rotbits_jax.verify(tmp_path / 'file', against=tmp_path / 'model').same_bits


def test_shards_of_a_model_that_is_kept(tmp_path):
  source = checkpoint(ROTATED)
  size = 200_000
  rotbits_jax.encode_to_file(source, tmp_path / 'all', preset='free', shard_size=size)
  assert len(list((tmp_path / 'all').glob('*.rotbits'))) > 2
  assert same(source, tmp_path / 'all')
  assert rotbits_jax.inspect(tmp_path / 'all').keeps == 'bits'


@pytest.mark.parametrize('step', [-10.5, -8.0])
def test_steps_that_are_finer_than_the_dtype(step):
  source = checkpoint('llama-tiny-sliced-head-0.25', 'no path')
  check(source, 'near', step=step)
  check(checkpoint(ALONE, 'no path'), 'near', step=step)


def test_near_of_plain_tensors():
  matrix = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
  tree = {'quantised': {'w': INT4(matrix).astype(BF16)}, 'w': matrix.astype(BF16)}
  data = rotbits_jax.encode(tree, preset='near')
  decoded = rotbits_jax.decode(data)
  assert structured.same_bits(decoded['quantised'], tree['quantised'])
  assert not structured.same_bits(decoded['w'], tree['w'])
  assert rotbits_jax.inspect(data).keeps == 'approximation'
  check(tree, 'near', step=-12.0)


def test_float32_of_bfloat16_numbers():
  source = checkpoint(ROTATED, 'no path')
  wide = source.model.replace(
    params=structured.astype(source.model.params, np.dtype(np.float32))
  )
  _, data, report = check(wide, 'free')
  assert report.keeps == 'bits'
  assert len(data) < 0.5 * report.input_bytes


def test_a_file_that_turns_out_larger_is_written_again(monkeypatch):
  source = checkpoint(ROTATED)
  choose = prices.choose
  later = lambda *args: choose(*args)._replace(is_exact=False)
  monkeypatch.setattr(prices, 'choose', later)
  _, data, report = check(source, 'free')
  assert same(source, data)
  assert report.keeps == 'bits'


def test_dense_weights_are_rewritten():
  for name in (ROTATED, 'llama-tiny-sliced-head-0.25'):
    report = rotbits_jax.inspect(rotbits_jax.encode(TESTDATA / name, preset='free'))
    assert report.keeps == 'function'
    assert not report.kept_records + report.kept_tensors


def test_transforms_of_others_are_applied():
  source = checkpoint(ROTATED)
  mark = rotbits_jax.passes.Transform('mark')
  data = rotbits_jax.encode(source, preset='near', transforms=(mark,))
  assert rotbits_jax.inspect(data).keeps == 'approximation'


def test_estimates_are_not_larger_than_exact(tmp_path):
  rotbits_jax.save_checkpoint(checkpoint(ROTATED), tmp_path / 'model')
  source = checkpoints.open_any(tmp_path / 'model')
  sizes = estimate.estimate(source)
  assert sizes['exact'] == sizes['free'] == sizes['near']


def found_step(target, most):
  """Returns the step that is found; all bits take `most` bytes, and so finer steps."""
  written = []

  def write(step, accepted):
    size = min(most, round(50_000 * (2.05 - step)))
    if size in accepted:
      written.append((step, size))
    return size

  estimate.write_within(target, write)
  return written[-1]


def test_a_target_size_above_that_of_all_bits():
  assert found_step(1_000_000, most=300_000)[1] == 300_000


def test_a_target_size_below_that_of_all_bits():
  for target in (100_000, 187_000, 250_000):
    assert 0.99 * target <= found_step(target, most=300_000)[1] <= target
