"""The commands, as a user types them."""

import importlib.metadata
import inspect
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from unittest import mock
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import weights_files
import word_checkpoints

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.cli import main
from rotbits_jax.cli import program
from rotbits_jax.file import estimation
from rotbits_jax.file import verification
from rotbits_jax.passes import tied
from rotbits_jax.presets import steps
from tests import random_models

ROOT = pathlib.Path(__file__).parents[1]
LICENSE = ROOT / 'LICENSE'
TESTDATA = pathlib.Path(__file__).parent / 'testdata'
DENSE = TESTDATA / 'llama-tiny-dense'
SLICED = TESTDATA / 'llama-tiny-sliced-head-0.25'
WEIGHTS = SLICED / 'Llama-2-tiny_0.25.pt'

# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings('ignore:.*load_module:DeprecationWarning')


@pytest.fixture(scope='module', name='encoded')
def _encoded(tmp_path_factory):
  """Encodes the sliced checkpoint with each preset but `paper`, which is slow."""
  directory = tmp_path_factory.mktemp('encoded')
  checkpoint = rotbits_jax.load_checkpoint(SLICED)
  for preset in ('free', 'exact', 'near'):
    data = rotbits_jax.encode(
      checkpoint.model, preset=preset, files=checkpoint.files, stem=checkpoint.stem
    )
    (directory / preset).write_bytes(data)
  return directory


@pytest.fixture(scope='module', name='readable')
def _readable(tmp_path_factory):
  """Makes both checkpoints with a tokenizer, and a text."""
  directory = tmp_path_factory.mktemp('readable')
  for source in (DENSE, SLICED):
    word_checkpoints.copy_with_tokenizer(source.name, directory)
  (directory / 'text').write_text(word_checkpoints.random_text(40))
  return directory


def keys(value):
  """The fields of a command's JSON, as its help names them."""
  nested = {'elements', 'bytes'} if 'preset' in value else set()
  return {
    *(key for key in value if key not in nested),
    *(f'{key}.{inner}' for key in nested for inner in value[key]),
  }


def documented(command):
  """The fields that the help of a command names."""
  module = importlib.import_module(f'rotbits_jax.cli.{command}')
  lines = inspect.getdoc(module).partition('JSON:\n\n')[2].splitlines()
  return {line.split()[0] for line in lines if re.match(r'  \w', line)}


def tensors_of(model):
  return {
    name: np.asarray(tensor) for name, tensor in checkpoints.to_tensors(model).items()
  }


def assert_same_tensors(actual, expected):
  assert sorted(actual) == sorted(expected)
  for name, tensor in expected.items():
    assert actual[name].dtype == tensor.dtype, name
    np.testing.assert_array_equal(actual[name], tensor, name)


class TestEncode:
  @pytest.mark.parametrize(
    'preset', ['free', 'exact', pytest.param('paper', marks=pytest.mark.slow)]
  )
  def test_sources_add_up_to_what_was_saved(self, rotbits, tmp_path, preset):
    output = tmp_path / 'model.rotbits'
    code, out, err = rotbits(
      'encode',
      f'--checkpoint={SLICED}',
      f'--output={output}',
      f'--preset={preset}',
      '--json',
    )
    assert (code, err) == (0, '')
    report = json.loads(out.splitlines()[-1])
    assert keys(report) == documented('encode') - {'notes'}
    assert report['given_bytes'] == WEIGHTS.stat().st_size
    assert report['left_out'] == ['ref_logits.npz']
    assert report['plain_because'] is None
    assert report['preset'] == preset
    assert report['family'] == 'llama'
    tensors = tensors_of(rotbits_jax.load_checkpoint(SLICED).model)
    assert report['elements']['input'] == sum(t.size for t in tensors.values())
    assert report['bytes']['input'] == sum(t.nbytes for t in tensors.values())
    assert report['bytes']['file'] == output.stat().st_size
    for line in report['lines']:
      assert set(line) == {'name', 'elements_saved', 'bytes_saved'}
    for key, numbers in (('bytes_saved', 'bytes'), ('elements_saved', 'elements')):
      whole, part = report[numbers].values()
      assert sum(line[key] for line in report['lines']) == whole - part
    assert min(line['bytes_saved'] for line in report['lines']) < 0

  def test_free_is_the_default(self, rotbits, tmp_path, encoded):
    output = tmp_path / 'model.rotbits'
    code, out, _ = rotbits('encode', f'--checkpoint={SLICED}', f'--output={output}')
    assert code == 0
    assert output.read_bytes() == (encoded / 'free').read_bytes()
    last = out.splitlines()[-1]
    assert re.fullmatch(
      rf'\d\d[.]\d\d% \([\d.]+ kB => [\d.]+ kB, {output}\) in \d+ s; the same function '
      'comes back, up to rounding, in other weights',
      last,
    )
    assert 'residual gauge' not in out

  def test_exact_is_the_default_for_dense_checkpoints(self, rotbits, tmp_path):
    output = tmp_path / 'model.rotbits'
    code, out, err = rotbits(
      'encode', f'--checkpoint={DENSE}', f'--output={output}', '--json'
    )
    assert (code, err) == (0, '')
    assert json.loads(out)['preset'] == 'exact'

  def test_an_unknown_family_is_stored_as_plain_tensors(self, rotbits, tmp_path):
    source = with_config(tmp_path, '{"model_type": "bert"}')
    (source / 'LICENSE').write_text('free')
    output = tmp_path / 'model.rotbits'
    code, out, err = rotbits('encode', f'--checkpoint={source}', f'--output={output}')
    assert (code, err) == (0, '')
    assert 'because' in out
    assert "model_type is 'bert'" in out
    code, out, err = rotbits(
      'decode', f'--input={output}', f'--output={tmp_path / "out"}', '--json'
    )
    assert (code, err) == (0, '')
    assert json.loads(out)['sliced'] is None
    for name in ('model.safetensors', 'config.json', 'LICENSE'):
      assert (tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes()

  def test_the_layout_of_files_is_said_and_can_be_kept(self, rotbits, tmp_path):
    source, output = tmp_path / 'source', tmp_path / 'model.rotbits'
    source.mkdir()
    (source / 'config.json').write_bytes((DENSE / 'config.json').read_bytes())
    tensors = tensors_of(rotbits_jax.load_checkpoint(DENSE).model)
    weights_files.write_torch(source / 'pytorch_model.bin', tensors, 'x')
    args = f'--checkpoint={source}', f'--output={output}', '--overwrite'
    code, out, _ = rotbits('encode', *args)
    assert code == 0
    assert 'come back as safetensors; with --same_files' in out
    code, out, _ = rotbits('encode', *args, '--same_files', '--verify')
    assert code == 0
    assert '--same_files' not in out
    decoded = tmp_path / 'out'
    assert rotbits('decode', f'--input={output}', f'--output={decoded}')[0] == 0
    assert {x.name: x.read_bytes() for x in decoded.iterdir()} == {
      x.name: x.read_bytes() for x in source.iterdir()
    }
    code, _, err = rotbits('encode', *args, '--same_files', '--preset=free')
    assert code == 2
    assert "the preset 'free' needs a model of a known family" in err

  def test_a_nested_state_dict_is_stored_as_plain_tensors(self, rotbits, tmp_path):
    source, output = tmp_path / 'source', tmp_path / 'model.rotbits'
    source.mkdir()
    (source / 'config.json').write_bytes((DENSE / 'config.json').read_bytes())
    weights, tensors = source / 'pytorch_model.bin', {'a': np.zeros(9999, np.float32)}
    weights_files.write_torch(weights, tensors, 'x')
    with zipfile.ZipFile(weights) as archive:
      members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(weights, 'w') as archive:
      for name, content in members.items():
        if name == 'x/data.pkl':  # {'model': ...}
          content = b'\x80\x02}X\x05\0\0\0model' + content[2:-1] + b's.'
        archive.writestr(name, content)
    code, out, err = rotbits('encode', f'--checkpoint={source}', f'--output={output}')
    assert (code, err) == (0, '')
    assert 'model: expected a tensor, got dict' in out
    np.testing.assert_array_equal(rotbits_jax.decode(output)['model.a'], tensors['a'])

  def test_a_file_that_is_no_saving_is_warned_of(self, rotbits, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.CheckpointReader, 'input_bytes', 1000)
    output = tmp_path / 'model.rotbits'
    code, _, err = rotbits('encode', f'--checkpoint={DENSE}', f'--output={output}')
    assert code == 0
    assert err.startswith(f'warning: {output} has ')
    assert 'given have 1,000: keep those' in err

  def test_config_file(self, rotbits, tmp_path, encoded):
    reports = []
    for config, override in (
      (['--config=free'], []),
      (['--config', 'free'], ['--config.tolerance=0.0']),
    ):
      code, out, _ = rotbits(
        'encode',
        f'--checkpoint={SLICED}',
        f'--output={tmp_path / "out"}',
        *config,
        '--overwrite',
        *override,
        '--overwrite',
        '--json',
      )
      assert code == 0
      reports.append(json.loads(out))
    assert reports[0]['bytes']['file'] == (encoded / 'free').stat().st_size
    # Without a tolerance no singular value counts as 1, and fewer bytes are saved.
    assert reports[1]['elements']['stored'] > reports[0]['elements']['stored']

  def test_a_field_of_a_config_file_that_is_no_option(self, rotbits, tmp_path):
    config = tmp_path / 'small.py'
    config.write_text(
      'import ml_collections\n'
      'def get_config():\n'
      "  return ml_collections.ConfigDict({'preset': 'near', 'target_size': 300_000})\n"
    )
    given = f'--checkpoint={SLICED}', f'--output={tmp_path / "out"}'
    code, _, err = rotbits('encode', *given, f'--config={config}')
    assert code == 2
    assert "the preset 'near' has no option 'target_size'" in err


class TestDecode:
  def test_safetensors_of_exact_are_the_input(self, rotbits, tmp_path, encoded):
    output = tmp_path / 'out'
    code, _, err = rotbits(
      'decode', f'--input={encoded / "exact"}', f'--output={output}'
    )
    assert (code, err) == (0, '')
    expected = rotbits_jax.load_checkpoint(SLICED)
    actual = safetensors.numpy.load_file(output / 'model.safetensors')
    assert_same_tensors(actual, tensors_of(expected.model))
    for name, content in expected.files.items():
      assert (output / name).read_bytes() == content

  def test_json_has_the_files_in_sub_folders(self, rotbits, tmp_path):
    checkpoint = rotbits_jax.load_checkpoint(DENSE)
    files = checkpoint.files | {'1_Pooling/config.json': b'{}'}
    (tmp_path / 'x').write_bytes(rotbits_jax.encode(checkpoint, files=files))
    args = f'--input={tmp_path / "x"}', f'--output={tmp_path / "out"}', '--json'
    code, out, _ = rotbits('decode', *args)
    assert code == 0
    found = json.loads(out)
    assert found['files'] == sorted([*files, 'model.safetensors'])
    written = [tmp_path / 'out' / name for name in found['files']]
    assert found['bytes'] == sum(path.stat().st_size for path in written)

  def test_slicegpt_of_exact_is_the_input(self, rotbits, tmp_path, encoded):
    output = tmp_path / 'out'
    code, _, err = rotbits(
      'decode',
      f'--input={encoded / "exact"}',
      f'--output={output}',
      '--format=slicegpt',
    )
    assert (code, err) == (0, '')
    (weights,) = SLICED.glob('*.pt')
    actual = rotbits_jax.load_checkpoint(output / weights.name)
    expected = rotbits_jax.load_checkpoint(weights)
    assert_same_tensors(tensors_of(actual.model), tensors_of(expected.model))
    assert actual.files == expected.files

  def test_free_has_the_names_and_shapes_of_the_input(self, rotbits, tmp_path, encoded):
    output = tmp_path / 'out'
    code, _, _ = rotbits('decode', f'--input={encoded / "free"}', f'--output={output}')
    assert code == 0
    actual = safetensors.numpy.load_file(output / 'model.safetensors')
    expected = tensors_of(rotbits_jax.load_checkpoint(SLICED).model)
    form = lambda tensors: {n: (t.shape, t.dtype) for n, t in tensors.items()}
    assert form(actual) == form(expected)


class TestEstimate:
  def test_it_is_close_to_the_files(self, rotbits, encoded):
    code, out, err = rotbits('estimate', '--json', f'--base={SLICED}', SLICED)
    assert (code, err) == (0, '')
    result = json.loads(out)
    assert set(result) == documented('estimate')
    found = {x['preset']: x['bytes'] for x in result['presets']}
    assert list(found) == ['exact', 'exact --base', 'free', 'near']
    for preset, most in (('exact', 0.01), ('free', 0.03), ('near', 0.03)):
      size = (encoded / preset).stat().st_size
      assert abs(found[preset] / size - 1) < most, preset
    assert found['exact --base'] < 0.1 * found['exact']
    needs = {x['preset']: (x['seconds'], x['memory']) for x in result['presets']}
    assert 0 < needs['exact'][0] < needs['free'][0] < 60
    assert 1 << 28 < needs['exact'][1] < needs['free'][1] < 1 << 30

  def test_any_dtype_and_no_columns(self):
    arrays = {'a': np.ones((64, 64), ml_dtypes.float8_e4m3fn), 'b': np.zeros((3, 0))}
    sampled = [estimation._Sample.of(x) for x in arrays.values()]
    assert 0 < estimation._of_record(sampled)[0] < 500

  def test_rows_stand_for_an_array(self, monkeypatch):
    """Samples of two sizes tell the cost of more rows, and what all rows share."""
    size_of = lambda x: 1000 + 3.0 * x.shape[1] + 2.5 * len(x)
    array = np.zeros((5000, 400), np.float16)
    monkeypatch.setattr(estimation, '_ELEMENTS', 1 << 14)
    found = estimation._Sample.of(array).nbytes(size_of)
    np.testing.assert_allclose(found, size_of(array))

  def test_a_wide_embedding_is_found_to_be_tied(self):
    rng = np.random.default_rng(0)
    kernel, matrix = (rng.normal(size=x) for x in ((64, 600), (64, 48)))
    table = (kernel.T @ matrix).astype(np.float16)
    outer = {'embed/tokens': table, 'head/kernel': kernel.astype(np.float16)}
    assert tied.is_tied(outer)
    assert not tied.is_tied(outer | {'embed/tokens': table[::-1]})
    assert not tied.is_tied({})

  def test_files_of_other_families(self, rotbits, tmp_path):
    source = with_config(tmp_path, '{"model_type": "bert"}')
    code, out, err = rotbits('estimate', source)
    assert (code, err) == (0, '')
    assert 'no free and near: ' in out
    assert "model_type is 'bert'" in out

  def test_a_sliced_model_beside_its_dense_one(self, rotbits):
    sliced, dense = (TESTDATA / f'phi2-tiny-{x}' for x in ('sliced-0.25', 'dense'))
    code, out, err = rotbits('estimate', sliced, f'--base={dense}')
    assert (code, err) == (0, '')
    assert 'no exact --base: the model was sliced from the base' in out

  def test_a_base_without_any_of_the_arrays(self, rotbits, tmp_path):
    base = tmp_path / 'x.safetensors'
    safetensors.numpy.save_file({'x': np.ones(3, np.float32)}, base)
    code, _, err = rotbits('estimate', SLICED, f'--base={base}')
    assert code == 2
    assert re.search(r'the base has no .*, nor any other array of the model', err)

  def test_layers_with_positions_of_their_own(self, rotbits, tmp_path):
    source = TESTDATA / 'gemma2-tiny-dense'
    given = checkpoints.load_checkpoint(source)
    config = json.loads(given.files['config.json'])
    config |= {'num_hidden_layers': 2 * given.model.config.num_layers}
    config['layer_types'] *= 2
    model = models.from_layers(
      checkpoints.parse_config(config), given.model.outer(), 2 * [*given.model.layers()]
    )
    files = given.files | {'config.json': json.dumps(config).encode()}
    saved = checkpoints.Checkpoint(model, files, None)
    checkpoints.save_checkpoint(saved, tmp_path / 'deep')
    code, out, err = rotbits('estimate', tmp_path / 'deep')
    assert (code, err) == (0, '')
    assert 'free' in out

  @pytest.mark.parametrize(
    'widths',
    [
      [20, 20, 20, 18, 18, 16, 16, 16, 14, 14, 14, 14, 24],
      [14, 18, 16, 20, 14, 20, 16, 16, 22, 18, 20],
    ],
  )
  def test_layers_of_any_widths_are_cut_to_fit(self, widths):
    model = random_models.sliced_llama(widths, np.float16)
    cutter = estimation._Cutter(model)
    for record in model.records:
      cutter.add(record, model.read(record))
    part = cutter.made(lambda job: None).model
    assert part.config.num_layers == 4
    expected = [models.outer_shapes(part.config)]
    expected += [models.layer_shapes(part.config, i) for i in range(4)]
    found = [
      {path: x.shape for path, x in structured.flatten(tree).items()}
      for tree in (part.outer(), *part.layers())
    ]
    assert found == [*map(structured.flatten, expected)]

  def test_a_wide_shortcut_without_numbers(self):
    sizes = {'num_hidden_layers': 1, 'hidden_size': 1024, 'num_attention_heads': 16}
    config = checkpoints.parse_config(random_models.BASE | sizes, None)
    none, path = np.zeros((384, 0), np.float16), 'layers.0/attention_shortcut/kernel'
    leaf = structured.IdentityMinusGram(none, none, 384)
    cut = estimation._CutOut(config, None, {}, {path: (768, 768)}, None)
    assert cut._size(path, leaf) == 0


class TestInspect:
  def test_json_is_that_of_encode(self, rotbits, encoded):
    code, out, err = rotbits('inspect', f'--input={encoded / "free"}', '--json')
    assert (code, err) == (0, '')
    assert json.loads(out) == rotbits_jax.inspect(encoded / 'free').to_json()
    assert keys(json.loads(out)) == documented('inspect') - {'notes'}
    _, out, _ = rotbits('inspect', f'--input={encoded / "free"}', '--json', '-v')
    assert keys(json.loads(out)) == documented('inspect')

  def test_layers_of_one_kind_are_one_row(self, rotbits, encoded):
    code, out, _ = rotbits('inspect', f'--input={encoded / "free"}')
    assert code == 0
    config = rotbits_jax.load(encoded / 'free').config
    rows = [line.split() for line in out.splitlines() if 'identity_minus_gram' in line]
    shortcuts = ['layers.*/attention_shortcut', 'layers.*/mlp_shortcut']
    assert [row[0] for row in rows] == shortcuts
    assert [int(row[2]) for row in rows] == [config.num_layers] * 2
    assert 'layers.0' not in out
    assert 'Adapters' in out

  def test_verbose_reports_every_shortcut(self, rotbits, encoded):
    code, out, _ = rotbits('inspect', f'--input={encoded / "free"}', '-v')
    assert code == 0
    config = rotbits_jax.load(encoded / 'free').config
    for layer in range(config.num_layers):
      assert f'layers.{layer}/attention_shortcut' in out
      assert f'layers.{layer}/mlp_shortcut' in out

  def test_text_says_that_only_the_header_was_read(self, rotbits, tmp_path, encoded):
    data = bytearray((encoded / 'free').read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / 'damaged').write_bytes(data)
    code, out, _ = rotbits('inspect', f'--input={tmp_path / "damaged"}')
    assert code == 0
    assert out.splitlines()[-1].startswith('Only the header was read')


class TestVerify:
  def test_lines_for_people(self, rotbits, encoded):
    args = ('verify', f'--input={encoded / "exact"}', f'--against={SLICED}')
    code, out, err = rotbits(*args)
    assert (code, err) == (0, '')
    assert f'all bits are those of {SLICED}' in out
    code, out, _ = rotbits(*args, '--json')
    assert json.loads(out)['same_bits'] is True

  def test_encode_verifies(self, rotbits, tmp_path, monkeypatch):
    def refuse(*args, **options):
      raise rotbits_jax.ContainerError('layers.0: decoded numbers differ')

    monkeypatch.setattr(verification, 'read_all', refuse)
    args = ('encode', f'--checkpoint={SLICED}', f'--output={tmp_path / "x"}')
    code, out, err = rotbits(*args, '--preset=exact', '--verify')
    assert (code, out) == (2, '')
    assert err == 'rotbits encode: layers.0: decoded numbers differ\n'
    assert list(tmp_path.iterdir()) == []


class TestEvaluate:
  def evaluate(self, rotbits, readable, model, *flags):
    code, out, err = rotbits(
      'evaluate',
      f'--model={model}',
      f'--text={readable / "text"}',
      '--json',
      *flags,
    )
    assert (code, err) == (0, '')
    result = json.loads(out.splitlines()[-1])
    assert keys(result) == documented('evaluate')
    return result

  def test_alone(self, rotbits, readable):
    result = self.evaluate(rotbits, readable, readable / DENSE.name, '--max_tokens=17')
    assert result['tokens'] == 16
    assert result['perplexity'] > 1
    assert result['kl'] is result['kl_rerounded'] is result['ear'] is None

  def test_a_file_beside_its_checkpoint(self, rotbits, readable, tmp_path):
    reference = readable / SLICED.name
    file = tmp_path / 'model.safetensors'  # recognised by its content, not by its name
    rotbits('encode', f'--checkpoint={reference}', f'--output={file}')
    result = self.evaluate(rotbits, readable, file, f'--reference={reference}')
    assert result['tokens'] == 39
    assert 0 < result['kl'] < 1e-4
    assert 0 < result['kl_rerounded'] < 1e-4

  def test_a_reference_that_needs_a_base(self, rotbits, readable, tmp_path):
    reference, base = readable / DENSE.name, readable / SLICED.name
    file = tmp_path / 'file'
    args = f'--checkpoint={reference}', f'--base={reference}', f'--output={file}'
    assert rotbits('encode', *args)[0] == 0
    flags = f'--reference={file}', f'--base={reference}'
    assert self.evaluate(rotbits, readable, base, *flags)['kl'] > 0
    assert self.evaluate(rotbits, readable, file, *flags)['kl'] == 0

  def test_a_dense_reference_has_a_noise_floor(self, rotbits, readable):
    result = self.evaluate(
      rotbits,
      readable,
      next((readable / SLICED.name).glob('*.pt')),
      f'--reference={readable / DENSE.name}',
    )
    assert result['kl'] > 10 * result['kl_rerounded'] > 0  # slicing changes more

  def test_lines_for_people(self, rotbits, readable):
    code, out, _ = rotbits(
      'evaluate',
      f'--model={readable / SLICED.name}',
      f'--reference={readable / SLICED.name}',
      f'--text={readable / "text"}',
    )
    assert code == 0
    heads = [line.split('  ')[0] for line in out.splitlines()]
    assert heads == ['perplexity', 'KL', 'EAR', 'noise floor']


def truncated(tmp_path):
  (weights,) = SLICED.glob('*.pt')
  copy = tmp_path / 'truncated'
  copy.mkdir()
  for file in SLICED.iterdir():
    (copy / file.name).write_bytes(file.read_bytes())
  (copy / weights.name).write_bytes(weights.read_bytes()[:-5000])
  return copy


def with_config(tmp_path, text):
  copy = tmp_path / 'copy'
  copy.mkdir()
  for file in DENSE.iterdir():
    (copy / file.name).write_bytes(file.read_bytes())
  (copy / 'config.json').write_text(text)
  return copy


class TestBadInput:
  """One line on stderr, exit code 2, and nothing written."""

  def check(self, rotbits, tmp_path, args, words):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    code, out, err = rotbits(*args)
    assert (code, out) == (2, '')
    assert err.startswith(f'rotbits {args[0]}: ')
    assert err.endswith('\n')
    assert len(err.splitlines()) == 1
    assert words in err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before

  @pytest.mark.parametrize(
    ('flags', 'words'),
    [
      ([], '--output'),
      (['--output=OUT', '--chekpoint=x'], '--chekpoint; did you mean --checkpoint?'),
      (['--output=OUT', 'more'], "'more'"),
      (['--output=OUT', '--preset=none'], 'free|exact'),
      (['--output=OUT', '--json=perhaps'], '--json'),
      (['--output=OUT/missing/file'], 'no such directory'),
      (['--output=.'], 'directory'),
      (['--output=OUT.index.json'], 'names of indices'),
      (['--output=OUT', '--preset=free', '--config=free'], 'cannot be combined'),
      (['--output=OUT', '--config=no_such.py'], 'no_such.py'),
      (['--output=OUT', '--config=frei'], "'frei' is no file and none of "),
      (['--output=OUT', f'--config={LICENSE}'], 'config'),
      (['--output=OUT', '--config=free', '--config.nothing=1'], 'nothing'),
      (['--output=OUT', '--config=free', '--config.tolerance=x'], 'tolerance'),
      (['--output=OUT', '--config=free', '--config.preset=none'], 'none'),
      (['--output=OUT', '--shard_size=0MB'], 'size like 2GB'),
      (['--output=OUT', '--preset=paper', '--shard_size=1MB'], 'in shards'),
      (['--output=OUT', '--preset=free', '--bits=4'], '--bits is not for'),
      (['--output=OUT', '--preset=near', '--bits=4', '--step=-5'], '--bits finds the'),
      (['--output=OUT', '--preset=near', '--bits=4', '--max_kl=1'], '--max_kl finds'),
      (['--output=OUT', '--preset=near', '--text=x'], '--text is for'),
      (['--output=OUT', '--preset=near', '--max_tokens=9'], '--max_tokens is for'),
      (['--output=OUT', '--preset=exact', '--max_tokens=9'], '--max_tokens is not for'),
      (['--output=OUT', '--process_id=0'], '--process_id is for --distributed'),
      (
        ['--output=OUT', '--distributed', '--coordinator=here', '--num_processes=2'],
        "--coordinator must be HOST:PORT, got 'here'",
      ),
      (['--output=OUT', '--preset=near', '--step=4'], 'step must be at most 1'),
      (['--output=OUT', '--preset=near', '--target_size=4XB'], 'size like 2GB'),
      (['--output=OUT', '--preset=near', '--bits=inf'], '--bits must be at most 64'),
      (
        ['--output=OUT', '--preset=near', '--bits=4', '--same_files'],
        '--same_files is',
      ),
      (['--output=OUT', '--preset=near', '--bits=4', f'--base={SLICED}'], '--base is'),
      (
        ['--output=OUT\xa0', '--shard_size=1MB', '--preset=near', '--bits=4'],
        'the name of shards must be printable',
      ),
    ],
  )
  def test_flags(self, rotbits, tmp_path, flags, words):
    flags = [f.replace('OUT', f'{tmp_path}/out') for f in flags]
    args = ['encode', f'--checkpoint={SLICED}', *flags]
    self.check(rotbits, tmp_path, args, words)

  @pytest.mark.parametrize(
    ('result', 'words'),
    [
      ('None', 'get_config() of --config returns NoneType'),
      ("{'preset': 'free'}", 'returns dict'),
      ("ConfigDict({'preset': ['free']})", "got ['free']"),
      ("ConfigDict({'preset': 'exact', 'transforms': 5})", 'must be an iterable'),
    ],
  )
  def test_configs(self, rotbits, tmp_path, monkeypatch, result, words):
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    config = tmp_path / 'config.py'
    config.write_text(
      'from ml_collections import ConfigDict\n\n\n'
      f'def get_config():\n  return {result}\n'
    )
    args = ['encode', f'--checkpoint={SLICED}', f'--output={tmp_path / "out"}']
    self.check(rotbits, tmp_path, [*args, f'--config={config}'], words)

  def test_paths_that_look_like_names_of_the_hub(self, rotbits, tmp_path):
    args = ['--checkpoint=../nope', f'--output={tmp_path / "out"}']
    code, _, err = rotbits('encode', *args)
    assert (code, 'hf download' in err) == (2, False)

  @pytest.mark.parametrize(
    ('make', 'words'),
    [
      (lambda tmp_path: tmp_path / 'missing', 'missing'),
      (lambda tmp_path: tmp_path, 'no .pt'),
      (lambda tmp_path: SLICED / 'config.json', 'config.json'),
      (truncated, '.pt'),
      (lambda tmp_path: with_config(tmp_path, '{"model_type": '), 'config.json'),
      (lambda tmp_path: with_config(tmp_path, '{"model_type": "bert"}'), 'bert'),
    ],
    ids=['missing', 'empty', 'no weights', 'truncated', 'no JSON', 'family'],
  )
  def test_checkpoint(self, rotbits, tmp_path, make, words):
    (tmp_path / 'output').write_text('the old file stays')
    args = [
      'encode',
      f'--checkpoint={make(tmp_path)}',
      f'--output={tmp_path / "output"}',
      '--overwrite',
      '--preset=free',
    ]
    self.check(rotbits, tmp_path, args, words)

  def test_the_search_has_the_tolerance(self, rotbits, tmp_path, readable):
    flags = {'checkpoint': readable / SLICED.name, 'text': readable / 'text'}
    flags |= {'preset': 'near', 'max_kl': 1, 'output': tmp_path / 'out'}
    args = ['encode', '--tolerance=2', *(f'--{key}={x}' for key, x in flags.items())]
    with mock.patch.object(steps, 'search', side_effect=ValueError('stop')) as search:
      self.check(rotbits, tmp_path, args, 'stop')
    assert search.call_args.kwargs['tolerance'] == 2

  def test_files_that_exist_need_overwrite(self, rotbits, tmp_path, encoded):
    output = tmp_path / 'output'
    output.write_text('the old file stays')
    encode = ['encode', f'--checkpoint={SLICED}', '--preset=exact']
    encode.append(f'--output={output}')
    self.check(rotbits, tmp_path, encode, f'{output}: the file exists; use --overwrite')
    (tmp_path / 'link').symlink_to('output')
    encode[-1] = f'--output={tmp_path / "link"}'
    self.check(rotbits, tmp_path, encode, f'{output}: the file exists')
    code, _, _ = rotbits(*encode, '--overwrite')
    assert code == 0
    assert (tmp_path / 'link').is_symlink()
    assert output.read_bytes() == (encoded / 'exact').read_bytes()

    decode = ['decode', f'--input={output}', f'--output={tmp_path / "out"}']
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'config.json').write_text('the old file stays')
    self.check(rotbits, tmp_path, decode, 'config.json: the file exists')
    code, _, _ = rotbits(*decode, '--overwrite')
    assert code == 0
    assert (tmp_path / 'out' / 'model.safetensors').exists()

  @pytest.mark.parametrize(
    ('path', 'words'),
    [
      ('gs://bucket/model', 'not a local path'),
      ('facebook/opt-125m', 'hf download facebook/opt-125m --local-dir opt-125m'),
    ],
  )
  def test_sources_elsewhere(self, rotbits, tmp_path, path, words):
    args = ['encode', f'--checkpoint={path}', f'--output={tmp_path / "out"}']
    self.check(rotbits, tmp_path, args, words)

  @pytest.mark.parametrize(
    ('command', 'flag'),
    [('encode', 'checkpoint'), ('encode', 'output'), ('decode', 'input')],
  )
  def test_pipes(self, rotbits, tmp_path, monkeypatch, command, flag):
    monkeypatch.chdir(tmp_path)
    names = {'encode': ('checkpoint', 'output'), 'decode': ('input', 'output')}[command]
    args = [f'--{x}={"-" if x == flag else tmp_path / x}' for x in names]
    code, _, err = rotbits(command, *args)
    assert (code, err.strip()) == (
      2,
      f'rotbits {command}: --{flag}=- is no file; pipes are not supported',
    )
    assert list(tmp_path.iterdir()) == []

  def test_devices_that_are_not_there(self, rotbits, monkeypatch, encoded):
    text = "Unable to initialize backend 'tpu': no libtpu.so"
    failing = mock.Mock(side_effect=RuntimeError(text))
    monkeypatch.setattr(rotbits_jax, 'inspect', failing)
    code, _, err = rotbits('inspect', f'--input={encoded / "free"}')
    assert (code, err) == (2, f'rotbits inspect: {text}\n')

  def test_no_other_kinds_of_files_are_replaced(self, rotbits, tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    args = ['encode', f'--checkpoint={SLICED}', '--overwrite', '--output=OUT']
    for path in (tmp_path / 'fifo', os.devnull):
      args[-1] = f'--output={path}'
      self.check(rotbits, tmp_path, args, 'not a regular file')
    args[-1] = '--output='
    self.check(rotbits, tmp_path, args, 'empty')

  def test_no_file_of_an_input_is_replaced(self, rotbits, tmp_path):
    source, base = tmp_path / 'source', tmp_path / 'base'
    for folder in (source, base):
      shutil.copytree(DENSE, folder)
    encode = ['encode', f'--checkpoint={source}', '--overwrite']
    files = base / 'one.rotbits', base / 'some.rotbits'
    for file, options in zip(files, ([], ['--shard_size=10KB']), strict=True):
      assert rotbits(*encode, f'--output={file}', *options)[0] == 0
    index = base / 'some.rotbits.index.json'
    (source / 'link').symlink_to('config.json')
    for given, output in (
      (base / 'one.rotbits', base / 'one.rotbits'),
      (base / 'some.rotbits', base / 'some.rotbits'),
      (index, base / 'some.rotbits'),
      (base, base / 'model.safetensors'),
      (base / 'model.safetensors', base / 'config.json'),
      (None, source / 'config.json'),
      (None, source / 'link'),
      (None, source / 'model.safetensors'),
    ):
      args = [*encode, f'--output={output}', *([f'--base={given}'] if given else [])]
      self.check(rotbits, tmp_path, args, 'is a file of an input')
    args = ['report', f'--input={files[1]}', '--overwrite']
    for output in (index, min(base.glob('some-*'))):
      self.check(rotbits, tmp_path, [*args, f'--output={output}'], 'is a file of an')
    args.append(f'--against={source}')
    for options, output in (([], source), ([f'--base={base}'], base)):
      path = f'--output={output / "config.json"}'
      self.check(rotbits, tmp_path, [*args, *options, path], 'is a file of an input')
    # Results in the folder of an input do not belong to it.
    (base / 'one.rotbits').write_bytes(b'damaged')
    linked = tmp_path / 'elsewhere.rotbits'
    assert rotbits(*encode, f'--output={linked}')[0] == 0
    (base / 'linked.rotbits').symlink_to(linked)
    for output in (*files, base / 'linked.rotbits'):
      assert rotbits(*encode, f'--output={output}', f'--base={base}')[0] == 0

  def test_no_file_to_which_an_input_links_is_replaced(self, rotbits, tmp_path):
    source = tmp_path / 'snapshots'
    source.mkdir()
    shutil.copytree(DENSE, tmp_path / 'blobs')
    for file in (tmp_path / 'blobs').iterdir():
      (source / file.name).symlink_to(file)
    args = ['encode', f'--checkpoint={source}', '--overwrite', '--output=OUT']
    for name in ('model.safetensors', 'config.json'):
      args[-1] = f'--output={tmp_path / "blobs" / name}'
      self.check(rotbits, tmp_path, args, 'is a file of an input')

  def test_no_file_of_an_input_is_replaced_by_slices(self, rotbits, tmp_path):
    shutil.copytree(DENSE, tmp_path / 'dense')
    (tmp_path / 'text').write_text('some words')
    args = [f'--{name}={tmp_path / "dense"}' for name in ('model', 'output')]
    args += [f'--calibration={tmp_path / "text"}', '--sparsity=0.25', '--overwrite']
    self.check(rotbits, tmp_path, ['slice', *args], 'is a file of an input')

  def test_no_file_of_a_pipeline_is_replaced(self, rotbits, tmp_path):
    (tmp_path / 'model_index.json').write_text('{}')
    for name in ('unet', 'vae'):
      (tmp_path / name).mkdir()
      shutil.copy(DENSE / 'model.safetensors', tmp_path / name)
    args = ['encode', f'--checkpoint={tmp_path}', '--overwrite', '--output=OUT']
    for name in ('unet/model.safetensors', 'vae/model.safetensors', 'model_index.json'):
      args[-1] = f'--output={tmp_path / name}'
      self.check(rotbits, tmp_path, args, 'is a file of an input')

  @pytest.mark.parametrize(
    ('command', 'damage', 'words'),
    [
      ('verify', lambda data: None, 'No such file'),
      ('report', lambda data: b'', 'not a rotbits file'),
      ('decode', lambda data: b'not a file of ours, at all', 'not a rotbits file'),
      ('inspect', lambda data: data[:100], 'cut short'),
      ('decode', lambda data: data[:-1], 'cut short'),
    ],
    ids=['missing', 'empty', 'other', 'header', 'streams'],
  )
  def test_file(self, rotbits, tmp_path, encoded, command, damage, words):
    data = damage((encoded / 'free').read_bytes())
    if data is not None:
      (tmp_path / 'damaged').write_bytes(data)
    args = [command, f'--input={tmp_path / "damaged"}']
    args += [f'--output={tmp_path / "out"}'] if command in ('decode', 'report') else []
    self.check(rotbits, tmp_path, args, words)

  def test_flipped_bit(self, rotbits, tmp_path, encoded):
    data = bytearray((encoded / 'free').read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / 'damaged').write_bytes(data)
    args = ['decode', f'--input={tmp_path / "damaged"}', f'--output={tmp_path / "out"}']
    self.check(rotbits, tmp_path, args, 'damaged')

  def test_decoding_over_a_file(self, rotbits, tmp_path, encoded):
    (tmp_path / 'out').write_text('the old file stays')
    args = ['decode', f'--input={encoded / "free"}', f'--output={tmp_path / "out"}']
    self.check(rotbits, tmp_path, args, 'is a file')

  @pytest.mark.parametrize(
    ('content', 'words'),
    [(None, 'No such file'), (b' \n', 'no words'), (b'\xff', 'UTF')],
  )
  def test_text(self, rotbits, tmp_path, content, words):
    if content is not None:
      (tmp_path / 'text').write_bytes(content)
    args = ['evaluate', f'--model={SLICED}', f'--text={tmp_path / "text"}']
    self.check(rotbits, tmp_path, args, words)

  def test_a_base_of_a_checkpoint(self, rotbits, tmp_path, readable):
    args = ['evaluate', f'--model={DENSE}', f'--text={readable / "text"}']
    args.append(f'--base={SLICED}')
    self.check(rotbits, tmp_path, args, f'{DENSE}: a checkpoint needs no base')

  def test_tokenizer_of_another_model(self, rotbits, tmp_path, readable):
    for file in (*SLICED.iterdir(), TESTDATA / 'opt-small-sliced-0.2/tokenizer.json'):
      (tmp_path / file.name).write_bytes(file.read_bytes())
    args = ['evaluate', f'--model={tmp_path}', f'--text={readable / "text"}']
    self.check(rotbits, tmp_path, args, 'is that of another model')

  def test_model_without_tokenizer(self, rotbits, tmp_path):
    args = ['evaluate', f'--model={SLICED}', f'--text={__file__}']
    self.check(rotbits, tmp_path, args, 'tokenizer.json')

  def test_damaged_file_to_evaluate(self, rotbits, tmp_path, encoded):
    (tmp_path / 'damaged').write_bytes((encoded / 'free').read_bytes()[:-1])
    args = ['evaluate', f'--model={tmp_path / "damaged"}', f'--text={__file__}']
    self.check(rotbits, tmp_path, args, 'cut short')


class TestSnapshot:
  def test_it_prints_the_folder(self, rotbits, tmp_path, monkeypatch, encoded):
    monkeypatch.setenv('ROTBITS_JAX_CACHE', str(tmp_path / 'cache'))
    code, out, _ = rotbits('snapshot', f'--input={encoded / "exact"}')
    folder = pathlib.Path(out.removesuffix('\n'))
    assert (code, folder.parent) == (0, tmp_path / 'cache/snapshots')
    assert (folder / 'config.json').exists()


class TestProgram:
  def test_usage(self, rotbits):
    code, out, err = rotbits()
    assert (code, err) == (0, '')
    for arg in ('help', '--help', '-h'):
      assert rotbits(arg) == (0, out, '')
    assert 'usage: rotbits' in out
    assert max(map(len, out.splitlines())) <= 80
    assert '129 and 143 ended by SIGHUP and SIGTERM' in out
    for name in main.COMMANDS:
      assert f'\n  {name} ' in out

  def test_unknown_command(self, rotbits):
    for words in (['enkode'], ['help', 'enkode']):
      code, out, err = rotbits(*words)
      expected = "rotbits: unknown command 'enkode'; did you mean encode?\n"
      assert (code, out, err) == (2, '', expected)
    assert rotbits('xyz')[2].endswith('it is one of ' + ', '.join(main.COMMANDS) + '\n')

  @pytest.mark.parametrize('command', main.COMMANDS)
  def test_help(self, rotbits, command):
    code, out, err = rotbits(command, '--help')
    assert (code, err) == (0, '')
    assert rotbits('help', command) == (0, out, '')
    assert re.search(rf'^  rotbits {command} (--|PATH)', out, re.M)
    assert max(map(len, out.splitlines())) <= 80
    # Flags that are needed come first, those of every command last.
    names = re.findall(r'^  (?:-v, )?--(\w+)', out.partition('\n\nJSON:')[0], re.M)
    assert names[-2:] == ['json', 'verbose']
    headings = re.findall(r'^(required|flags.*|only with --preset=.*):$', out, re.M)
    assert headings[-1] == 'flags of every command'
    assert 'required' not in headings[1:]
    # The example parses: every flag in it is one.
    example = out.partition('Example:\n\n')[2].partition('\n\n')[0]
    module = importlib.import_module(f'rotbits_jax.cli.{command}')
    lines = example.replace('\\\n', ' ').splitlines()
    own = ' '.join(line for line in lines if f'rotbits {command} ' in line)
    flags = re.findall(r'--(\w+)', own)
    assert flags
    assert set(flags) <= set(module.FLAGS.values)
    # Without flags it says which one is missing.
    missing = (
      f'rotbits {command}: --\\w+=\\.\\.\\. is missing; see rotbits {command} --help\n'
    )
    code, out, err = rotbits(command)
    assert (code, out) == (2, '')
    assert re.fullmatch(missing, err)

  def test_version(self, rotbits):
    for flag in ('--version', '-v'):
      assert rotbits(flag) == (0, f'rotbits {rotbits_jax.__version__}\n', '')

  def test_verbose_errors_have_their_traceback(self, rotbits):
    code, _, err = rotbits('inspect', '--input=missing', '-v')
    assert code == program.BAD_INPUT
    assert err.startswith('Traceback')
    assert err.endswith('rotbits inspect: missing: No such file or directory\n')

  @pytest.mark.parametrize(
    ('words', 'expected'),
    [
      (['en'], ['encode']),
      (['encode', '--pre'], ['--preset=']),
      (['encode', '--preset', '='], list(rotbits_jax.PRESETS)),
      (['encode', '--preset', '=', 'pa'], ['paper']),
      (['decode', '--output', '=', 'LICEN'], ['LICENSE']),
    ],
  )
  def test_completion(self, rotbits, words, expected):
    _, script, _ = rotbits('completion', '--shell=bash')
    words = ' '.join(map(repr, ['rotbits', *words]))
    code = (
      f'{script}\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n'
      '_rotbits; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
      ['bash', '-c', code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == expected

  @pytest.mark.parametrize('shell', ['zsh', 'fish'])
  def test_completion_of_other_shells(self, rotbits, shell):
    code, script, err = rotbits('completion', f'--shell={shell}')
    assert (code, err) == (0, '')
    for name in main.COMMANDS:
      assert name in script

  def test_without_a_home_no_folder_appears(self, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
    config = mock.Mock(jax_compilation_cache_dir=None)
    monkeypatch.setattr(program, 'jax', mock.Mock(config=config))
    program._keep_programs()
    config.update.assert_not_called()
    assert list(tmp_path.iterdir()) == []

  def test_a_cache_that_cannot_be_written_is_not_used(self, monkeypatch, tmp_path):
    monkeypatch.setenv('ROTBITS_JAX_CACHE', str(tmp_path))
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    config = mock.Mock(jax_compilation_cache_dir=None)
    monkeypatch.setattr(program, 'jax', mock.Mock(config=config))
    program._keep_programs()
    config.update.assert_not_called()

  def test_a_folder_of_programs_that_the_user_names_stays(self, monkeypatch, tmp_path):
    config = mock.Mock(jax_compilation_cache_dir=str(tmp_path))
    monkeypatch.setattr(program, 'jax', mock.Mock(config=config))
    program._keep_programs()
    config.update.assert_not_called()

  def test_interrupted(self, rotbits, monkeypatch, encoded):
    monkeypatch.setattr(rotbits_jax, 'inspect', interrupt)
    code, out, err = rotbits('inspect', f'--input={encoded / "free"}')
    assert (code, out, err) == (128 + signal.SIGINT, '', '')

  def test_faults_keep_their_traceback(self, rotbits, monkeypatch, encoded):
    monkeypatch.setattr(rotbits_jax, 'inspect', lambda path: None)
    with pytest.raises(AttributeError):
      rotbits('inspect', f'--input={encoded / "free"}')

  def test_characters_that_stdout_cannot_encode_are_escaped(
    self, monkeypatch, tmp_path
  ):
    path, stdout = tmp_path / 'f\xfcr', io.TextIOWrapper(io.BytesIO(), 'ascii')
    rotbits_jax.encode_to_file({'a': np.ones(3)}, path, preset='exact')
    monkeypatch.setattr(sys, 'stdout', stdout)
    monkeypatch.setattr(sys, 'argv', ['rotbits', 'verify', f'--input={path}'])
    assert main.main() == 0
    text = stdout.buffer.getvalue().decode('ascii')
    assert text.startswith(rf'{tmp_path}/f\xfcr: 1 tensors')

  def test_names_do_not_steer_a_terminal(self, rotbits, tmp_path):
    source = tmp_path / 'source'
    source.mkdir()
    tensors = {'a': np.ones(3)}
    safetensors.numpy.save_file(tensors, source / 'model.safetensors')
    config = {'model_type': 'x\x1b[2J'}
    (source / 'config.json').write_text(json.dumps(config))
    for name in ('folder\x1b[2J', 'two\nlines', os.fsdecode(b'not \xff UTF-8')):
      (source / name).mkdir()
    arguments = f'--checkpoint={source}', f'--output={tmp_path / "out"}', '--overwrite'
    code, out, _ = rotbits('encode', *arguments)
    assert code == 0
    assert '\x1b' not in out
    (line,) = [line for line in out.splitlines() if line.startswith('not kept')]
    for name in (r'folder\x1b[2J', r'two\nlines', r'not \udcff UTF-8'):
      assert name in line
    assert 'stored as plain tensors' in out
    code, out, _ = rotbits('encode', *arguments, '--json')
    assert code == 0
    assert out.isascii()
    assert '\x1b' not in out

  def test_one_line_of_many(self):
    assert program.one_line(ValueError('first\n  second')) == 'first second'
    assert program.one_line(ValueError()) == 'ValueError'
    error = FileNotFoundError(2, 'No such file or directory', 'a file')
    assert program.one_line(error) == 'a file: No such file or directory'


def interrupt(*args):
  raise KeyboardInterrupt


class TestProcess:
  """Behaviour that only a separate process shows."""

  def run(self, *args):
    return self.run_python('-m', *map(str, args))

  def run_code(self, program):
    return self.run_python('-c', program)

  def run_python(self, *args):
    return subprocess.run(
      [sys.executable, *args],
      capture_output=True,
      text=True,
      cwd=ROOT,
      stdin=subprocess.DEVNULL,
      check=False,
    )

  def test_module_in_a_pipe(self, tmp_path):
    done = self.run(
      'rotbits_jax',
      'encode',
      f'--checkpoint={SLICED}',
      f'--output={tmp_path / "out"}',
      '--preset=exact',
      '--json',
    )
    assert (done.returncode, done.stderr) == (0, '')
    (line,) = done.stdout.splitlines()
    assert json.loads(line)['bytes']['file'] == (tmp_path / 'out').stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ['out']

  def test_compiled_programs_are_kept(self, tmp_path, monkeypatch, encoded):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    arguments = f'--input={encoded / "exact"}', f'--output={tmp_path / "out"}'
    done = self.run('rotbits_jax', 'decode', *arguments)
    assert (done.returncode, done.stderr) == (0, '')
    kept = tmp_path / 'rotbits_jax'
    assert any('jit__pop' in path.name for path in kept.iterdir())

  def test_error(self):
    done = self.run('rotbits_jax', 'enkode')  # it needs no JAX, which is slow to import
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == "rotbits: unknown command 'enkode'; did you mean encode?\n"

  def test_a_signal_leaves_nothing(self, tmp_path, encoded):
    program = f"""
import os, signal, sys
from rotbits_jax.checkpoints import writer
from rotbits_jax.cli import main
add = writer.CheckpointWriter.add
def stopped(self, path, leaf):
  add(self, path, leaf)
  assert os.listdir({str(tmp_path)!r})
  os.kill(os.getpid(), number)
writer.CheckpointWriter.add = stopped
for number in signal.SIGINT, signal.SIGHUP, signal.SIGTERM:
  sys.argv = ['rotbits', 'decode', {f'--input={encoded / "exact"}'!r},
              {f'--output={tmp_path / "a" / "out"}'!r}]
  code = main.main()
  assert code == 128 + number, code
  assert os.listdir({str(tmp_path)!r}) == []
sys.exit(code)
"""
    done = self.run_code(program)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, '', '')

  @pytest.mark.parametrize('command', ['decode', 'report'])
  def test_a_signal_during_start_up_leaves_nothing(self, tmp_path, encoded, command):
    program = f"""
import os, sys
class Finder:
  def find_spec(self, name, path, target=None):
    if name == 'jax':
      os.kill(os.getpid(), {int(signal.SIGTERM)})
sys.meta_path.insert(0, Finder())
from rotbits_jax.cli import main
sys.argv = ['rotbits', {command!r}, {f'--input={encoded / "exact"}'!r},
            {f'--output={tmp_path / "a" / "out"}'!r}]
sys.exit(main.main())
"""
    done = self.run_code(program)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, '')
    assert list(tmp_path.iterdir()) == []

  def test_an_interrupted_run_says_what_it_keeps(self, tmp_path):
    program = f"""
import os, sys
from rotbits_jax.cli import main
from rotbits_jax.file import journal
note = journal.Journal.note
def stopped(self, *args):
  note(self, *args)
  os.kill(os.getpid(), {int(signal.SIGINT)})
journal.Journal.note = stopped
sys.argv = ['rotbits', 'encode', {f'--checkpoint={SLICED}'!r}, '--preset=exact',
            {f'--output={tmp_path / "out"}'!r}]
sys.exit(main.main())
"""
    done = self.run_code(program)
    assert done.returncode == 128 + signal.SIGINT
    kept = tmp_path / '.out.partial'
    assert done.stderr == (
      f'rotbits encode: 1 records are kept in {kept}: the same command continues after '
      'them; remove the folder if you do not want that\n'
    )
    assert list(tmp_path.iterdir()) == [kept]

  def test_progress_that_nobody_reads(self, tmp_path):
    program = f"""
import sys
from rotbits_jax.system import progress
from rotbits_jax.cli import main
progress._SECONDS = 0  # a line for every stage
sys.argv = ['rotbits', 'encode', {f'--checkpoint={SLICED}'!r}, '--preset=exact',
            {f'--output={tmp_path / "out"}'!r}]
sys.exit(main.main())
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
      [sys.executable, '-c', program], stderr=writer, cwd=ROOT, check=False
    )
    os.close(writer)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ['out']

  @pytest.mark.parametrize('args', [['--help'], ['inspect', '--input=FILE']])
  def test_reader_that_stops(self, encoded, args):
    reader, writer = os.pipe()
    os.close(reader)
    args = [arg.replace('FILE', str(encoded / 'free')) for arg in args]
    done = subprocess.run(
      [sys.executable, '-m', 'rotbits_jax', *args],
      stdout=writer,
      stderr=subprocess.PIPE,
      cwd=ROOT,
      check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b'')

  def test_streams_that_are_closed(self, tmp_path, encoded):
    output = tmp_path / 'out'
    command = [sys.executable, '-m', 'rotbits_jax', 'encode', '--preset=exact']
    command += [f'--checkpoint={SLICED}', f'--output={output}']
    closed = ['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh']
    done = subprocess.run([*closed, *command], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert output.read_bytes() == (encoded / 'exact').read_bytes()

  def test_console_script(self):
    scripts = importlib.metadata.entry_points(group='console_scripts', name='rotbits')
    if not scripts:
      pytest.skip('the package is not installed')
    (script,) = scripts
    assert script.load() is main.main
