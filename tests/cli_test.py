"""The commands, as a user types them."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from unittest import mock

import chex
import jax
import numpy as np
import pytest
import random_models
import word_checkpoints

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.cli import main
from rotbits_jax.file import estimate

ROOT = pathlib.Path(__file__).parents[1]
TESTDATA = ROOT / 'tests' / 'testdata'
DENSE = TESTDATA / 'llama-tiny-dense'
SLICED = TESTDATA / 'llama-tiny-sliced-head-0.25'

# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings('ignore:.*load_module:DeprecationWarning')


@pytest.fixture(scope='module', name='encoded')
def _encoded(tmp_path_factory):
  """Encodes the sliced checkpoint with each preset but `paper`, which is slow."""
  directory = tmp_path_factory.mktemp('encoded')
  for preset in ('free', 'exact', 'near'):
    rotbits_jax.encode_to_file(SLICED, directory / preset, preset=preset)
  return directory


@pytest.fixture(scope='module', name='readable')
def _readable(tmp_path_factory):
  """Makes both checkpoints with a tokenizer, and a text."""
  directory = tmp_path_factory.mktemp('readable')
  for source in (DENSE, SLICED):
    word_checkpoints.copy_with_tokenizer(source.name, directory)
  (directory / 'text').write_text(word_checkpoints.random_text(40))
  return directory


def json_of(rotbits, *args):
  """Runs a command that succeeds and returns its JSON."""
  code, out, err = rotbits(*args, '--json')
  assert (code, err) == (0, '')
  return json.loads(out)


def tensors_of(model):
  return {
    name: np.asarray(tensor) for name, tensor in checkpoints.to_tensors(model).items()
  }


@pytest.mark.parametrize(
  'preset', ['free', 'exact', 'near', pytest.param('paper', marks=pytest.mark.slow)]
)
def test_encode_says_where_the_bytes_are_saved(rotbits, tmp_path, preset):
  output = tmp_path / 'model.rotbits'
  report = json_of(rotbits, 'encode', SLICED, output, f'--preset={preset}')
  assert (report['preset'], report['family']) == (preset, 'llama')
  assert report['bytes']['file'] == output.stat().st_size
  for key, numbers in (('bytes_saved', 'bytes'), ('elements_saved', 'elements')):
    whole, part = report[numbers].values()
    assert sum(line[key] for line in report['lines']) == whole - part
  assert json_of(rotbits, 'inspect', output).items() <= report.items()


def test_options_in_a_config(rotbits, tmp_path, encoded):
  stored = []
  for override in ([], ['--config.tolerance=0.0']):
    paths = SLICED, tmp_path / 'file'
    options = '--overwrite', '--config=free', *override
    report = json_of(rotbits, 'encode', *paths, *options)
    stored.append(report['elements']['stored'])
    if not override:
      assert report['bytes']['file'] == (encoded / 'free').stat().st_size
  assert stored[1] > stored[0]  # without a tolerance no singular value counts as 1


@pytest.mark.parametrize('output_format', ['safetensors', 'slicegpt'])
def test_decode(rotbits, tmp_path, encoded, output_format):
  output = tmp_path / 'out'
  paths = encoded / 'exact', output
  result = json_of(rotbits, 'decode', *paths, f'--format={output_format}')
  assert result['sliced']
  (weights,) = [x for x in output.iterdir() if x.suffix in ('.pt', '.safetensors')]
  tensors = tensors_of(rotbits_jax.load_checkpoint(SLICED).model)
  chex.assert_trees_all_equal(
    tensors_of(rotbits_jax.load_checkpoint(weights).model), tensors
  )


def test_estimates_are_close_to_the_files(rotbits, encoded):
  result = json_of(rotbits, 'estimate', SLICED)
  for preset in ('exact', 'free', 'near'):
    size = (encoded / preset).stat().st_size
    assert abs(result['presets'][preset] / size - 1) < 0.02, preset
  tied = TESTDATA / 'opt-small-sliced-0.2'  # `exact` finds its embedding in its head
  size = len(rotbits_jax.encode(tied, preset='exact'))
  estimated = estimate.estimate(checkpoints.open_any(tied))['exact']
  assert abs(estimated / size - 1) < 0.02


def test_free_of_a_dense_model_is_estimated_and_told_as_it_is(rotbits, tmp_path):
  size = {'hidden_size': 96, 'num_hidden_layers': 6, 'vocab_size': 2000}
  opt = random_models.OPT | size | {'ffn_dim': 384, 'word_embed_proj_dim': 96}
  tied = random_models.FAMILIES['llama'] | size | {'tie_word_embeddings': True}
  tied |= {'head_dim': 32}
  for name, config_json in (('opt', opt), ('tied', tied)):
    files = {'config.json': json.dumps(config_json).encode()}
    model = random_models.random_model(config_json, np.float16)
    checkpoint = checkpoints.Checkpoint(model, files, None)
    rotbits_jax.save_checkpoint(checkpoint, tmp_path / name)
  for source in (DENSE, tmp_path / 'opt', tmp_path / 'tied'):
    estimated = json_of(rotbits, 'estimate', source)['presets']
    assert ('the same as exact' in rotbits('estimate', source)[1]) == (source != DENSE)
    file = tmp_path / f'{source.name}.rotbits'
    report = json_of(rotbits, 'encode', source, file, '--preset=free')
    assert abs(estimated['free'] / report['bytes']['file'] - 1) < 0.02, source
    # No gauge of a tied Llama is worth its rounding errors, so nothing changes.
    assert report['keeps'] == ('bits' if source.name == 'tied' else 'function')
  assert json_of(rotbits, 'verify', file, f'--against={source}')['same_bits']


def test_verify_and_inspect(rotbits, encoded):
  against = f'--against={SLICED}'
  assert json_of(rotbits, 'verify', encoded / 'exact', against)['same_bits'] is True
  assert json_of(rotbits, 'verify', encoded / 'free', against)['kl'] < 1e-4
  assert json_of(rotbits, 'verify', encoded / 'exact')['same_bits'] is None
  code, out, _ = rotbits('inspect', encoded / 'free', '--verbose')
  assert code == 0
  assert 'layers.0/attention_shortcut' in out


def test_verify_names_weights_that_are_not_stored(rotbits, tmp_path):
  source, output = tmp_path / 'source', tmp_path / 'output'
  shutil.copytree(DENSE, source)
  (source / 'model.onnx').write_bytes(b'x')
  rotbits('encode', source, output)
  code, out, _ = rotbits('verify', output, f'--against={source}')
  assert code == 2
  assert 'NOT STORED: model.onnx (keep the original of these)' in out


def test_verify_takes_an_encoded_file_and_says_how_it_compared(rotbits, encoded):
  against = f'--against={encoded / "exact"}'
  result = json_of(rotbits, 'verify', encoded / 'exact', against)
  assert result['ways']['bits']['tensors'] == result['compared'] == result['tensors']
  assert result['files_compared'] == result['files'] > 0


@pytest.mark.parametrize('preset', ['exact', 'free'])
def test_encode_compares_with_the_disk(rotbits, tmp_path, preset):
  source, output = tmp_path / 'source', tmp_path / 'output'
  shutil.copytree(DENSE, source)
  encode = 'encode', source, output, f'--preset={preset}', '--verify'
  assert f'compared with {source}' in rotbits(*encode)[1]
  decoded, flipped = file.Reader.files, {'config.json': b'{}'}
  with mock.patch.object(file.Reader, 'files', lambda self: decoded(self) | flipped):
    check_refused(rotbits, tmp_path, [*encode, '--overwrite'], 'config.json: differs')


def test_evaluate(rotbits, readable, tmp_path):
  reference, text = readable / SLICED.name, f'--text={readable / "text"}'
  encoded = tmp_path / 'model.safetensors'  # recognised by its content
  assert rotbits('encode', reference, encoded)[0] == 0
  dense = readable / DENSE.name
  alone = json_of(rotbits, 'evaluate', dense, text, '--max_tokens=17')
  assert (alone['tokens'], alone['kl']) == (16, None)
  against = f'--against={reference}'
  compared = json_of(rotbits, 'evaluate', encoded, against, text)
  assert compared['tokens'] == 39
  assert 0 < compared['kl'] < 1e-4
  assert 0 < compared['kl_rerounded'] < 1e-4


ENCODE = ('encode', f'{SLICED}', 'OUT')
NEAR = (*ENCODE, '--preset=near')
CONFIG = (*ENCODE, '--config=free')
# Commands, and a word of the line on stderr. IN is a folder of damaged inputs.
BAD_INPUT = (
  (('encode',), "'checkpoint'; usage: rotbits encode CHECKPOINT [FILE]"),
  ((*ENCODE, '--chekpoint=x'), 'chekpoint'),
  ((*ENCODE, 'more'), 'too many'),
  ((*ENCODE, '--preset=none'), 'free|exact'),
  ((*ENCODE, '--base=gs://bucket/model'), 'gs:'),
  ((*ENCODE, '--shard_size=0MB'), 'size like 2GB'),
  ((*ENCODE[:2], '.'), 'directory'),
  ((*ENCODE[:2], '/dev/null', '--overwrite'), 'not a regular file'),
  ((*CONFIG, '--preset=free'), '(config, preset)'),
  ((*CONFIG, '--config.nothing=1'), "--config has no 'nothing'"),
  ((*ENCODE, '--config=published:x'), "--config has no 'x'"),
  (('encode', f'{DENSE}', 'OUT', '--preset=paper'), 'needs a sliced checkpoint'),
  ((*CONFIG, '--config.tolerance=x'), 'tolerance'),
  ((*ENCODE, '--config=no_such.py'), 'no_such.py'),
  ((*ENCODE, '--preset=free', '--step=-4'), '--step is for'),
  ((*NEAR, '--target_size=1MB', '--step=-5'), 'At most one of (step'),
  ((*NEAR, '--max_kl=1'), 'needs a --text'),
  ((*NEAR, '--step=4'), 'step must be'),
  (('encode', 'IN/missing', 'OUT'), 'missing'),
  (('encode', 'IN/truncated', 'OUT'), '.pt'),
  (('encode', 'IN/bert', 'OUT', '--preset=free'), 'bert'),
  (('verify', 'IN/missing'), 'No such file'),
  (('decode', 'IN/tuned', 'OUT'), 'IN/tuned: w: it needs --base='),
  (('verify', 'IN/tuned', '--base=IN/other'), 'w: IN/other is another base: '),
  (
    ('decode', 'IN/tuned', 'OUT', '--base=IN/bert', '--base=IN/other'),
    'no base; leave out',
  ),
  (('report', 'IN/empty', 'OUT'), 'not a rotbits file'),
  (('inspect', 'IN/header'), 'cut short'),
  (('decode', 'IN/cut', 'OUT'), 'cut short'),
  (('decode', 'IN/flipped', 'OUT'), 'damaged'),
  (('evaluate', f'{SLICED}', '--text=IN/missing'), 'No such file'),
)


@pytest.fixture(scope='module', name='damaged')
def _damaged(tmp_path_factory, encoded):
  """Makes damaged checkpoints and files."""
  folder = tmp_path_factory.mktemp('damaged')
  shutil.copytree(SLICED, folder / 'truncated')
  (weights,) = (folder / 'truncated').glob('*.pt')
  weights.write_bytes(weights.read_bytes()[:-5000])
  shutil.copytree(DENSE, folder / 'bert')
  (folder / 'bert' / 'config.json').write_text('{"model_type": "bert"}')
  base = {'w': np.arange(4096, dtype=np.float16)}
  rotbits_jax.encode_to_file({'w': base['w'] + 1}, folder / 'tuned', base=base)
  rotbits_jax.encode_to_file({'w': base['w'] + 2}, folder / 'other')
  data = (encoded / 'free').read_bytes()
  flipped = data[:9999] + b'ab' + data[10001:]
  files = {'empty': b'', 'header': data[:100], 'cut': data[:-1], 'flipped': flipped}
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return folder


def check_refused(rotbits, folder, args, words):
  """Checks for one line on stderr, exit code 2, and nothing written."""
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  code, out, err = rotbits(*args)
  assert (code, out) == (2, '')
  assert err.startswith(f'rotbits {args[0]}: ')
  assert len(err.splitlines()) == 1
  assert words in err
  assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


def test_bad_input(rotbits, tmp_path, damaged, subtests):
  for args, words in BAD_INPUT:
    with subtests.test(args=args):
      places = [x.replace('OUT', f'{tmp_path}/out') for x in args]
      places = [x.replace('IN', str(damaged)) for x in places]
      check_refused(rotbits, tmp_path, places, words.replace('IN/', f'{damaged}/'))


@pytest.mark.parametrize(
  'error', [MemoryError(), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: x')]
)
def test_too_little_memory_is_one_line(rotbits, encoded, monkeypatch, error):
  monkeypatch.setattr(rotbits_jax, 'inspect', mock.Mock(side_effect=error))
  code, output, errors = rotbits('inspect', encoded / 'exact')
  assert (code, output, errors.count('\n')) == (1, '', 1)
  assert 'too little memory' in errors


def test_files_that_exist_need_overwrite(rotbits, tmp_path, encoded):
  output = tmp_path / 'output'
  output.write_text('the old file stays')
  encode = ['encode', SLICED, output, '--preset=exact']
  check_refused(
    rotbits, tmp_path, encode, f'{output}: the file exists; use --overwrite'
  )
  assert rotbits(*encode, '--overwrite')[0] == 0
  assert output.read_bytes() == (encoded / 'exact').read_bytes()
  decode = ['decode', output, tmp_path / 'out']
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'config.json').write_text('the old file stays')
  check_refused(rotbits, tmp_path, decode, 'the folder has files')
  assert rotbits(*decode, '--overwrite')[0] == 0
  assert (tmp_path / 'out' / 'model.safetensors').exists()


def test_usage(rotbits):
  code, out, err = rotbits()
  assert (code, err) == (0, '')
  assert rotbits('--help') == (0, out, '')
  for name in main.COMMANDS:
    assert f'\n  {name} ' in out
  assert rotbits('--version') == (0, f'rotbits {rotbits_jax.__version__}\n', '')
  code, out, err = rotbits('enkode')
  assert (code, out, err.count('\n')) == (2, '', 1)


def test_help(rotbits, subtests):
  for command in main.COMMANDS:
    with subtests.test(command=command):
      code, out, err = rotbits(command, '--help')
      assert (code, err) == (0, '')
      example = re.search(rf'^  .*rotbits {command} (.*)', out, re.M)[1]
      for flag in re.findall(r'--(\w+)', example):
        assert re.search(rf'^  --{flag}[ =]', out, re.M)

      code, out, err = rotbits(command, '-h')
      assert (code, err) == (0, '')
      assert f'\n\nrotbits {command} ' in out
      assert '  --json ' in out
      assert 'JSON: ' not in out


def test_paths_by_position_have_defaults(rotbits, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  shutil.copytree(DENSE, tmp_path / 'models' / 'MINE.v2')
  assert rotbits('encode', '~/models/MINE.v2/')[0] == 0
  assert rotbits('decode', 'models/MINE.v2.rotbits')[0] == 2  # there is the input
  assert rotbits('decode', 'models/MINE.v2.rotbits', '--overwrite', '~/again')[0] == 0
  assert rotbits('report', 'models/MINE.v2.rotbits')[0] == 0
  weights = 'model.safetensors'
  expected = (DENSE / weights).read_bytes()
  assert (tmp_path / 'again' / weights).read_bytes() == expected
  monkeypatch.chdir(tmp_path / 'again')
  assert rotbits('encode', '.')[0] == 0
  for name in ('again.rotbits', 'models/MINE.v2.rotbits', 'models/MINE.v2.html'):
    assert (tmp_path / name).is_file()
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'again', 'again.rotbits', 'models'}


def test_a_reader_of_the_output_may_stop(encoded):
  reading, writing = os.pipe()
  os.close(reading)
  with os.fdopen(writing) as pipe:
    done = subprocess.run(
      [sys.executable, '-m', 'rotbits_jax', 'inspect', encoded / 'exact'],
      check=False,
      cwd=ROOT,
      stdout=pipe,
      stderr=subprocess.PIPE,
    )
  assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b'')


@pytest.mark.parametrize('place', ['callback', 'import'])
def test_an_interrupt_prints_nothing(encoded, place):
  code = """
import gc, signal, sys, time
import rotbits_jax
from rotbits_jax.cli import main

def interrupt(*info):
  gc.callbacks.clear()
  signal.raise_signal(signal.SIGINT)

class Finder:
  def find_spec(name, *info):  # an extension of jaxlib imports NumPy
    return interrupt() if name == 'numpy' else None

def inspect(path):
  gc.callbacks.append(interrupt)
  gc.collect()
  while True:
    time.sleep(0.01)

if sys.argv.pop() == 'import':
  sys.meta_path.insert(0, Finder)
rotbits_jax.inspect = inspect
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
sys.exit(main.main())
"""
  done = subprocess.run(
    [sys.executable, '-c', code, 'inspect', encoded / 'exact', place],
    capture_output=True,
    check=False,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    text=True,
    timeout=50,
  )
  assert done.returncode in (130, -signal.SIGINT)
  assert (done.stdout, done.stderr) == ('', '')
