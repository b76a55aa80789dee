"""PyTrees and checkpoints of any family: stored bit for bit as plain arrays."""

import json
import pathlib
import tempfile
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import weights_files

from fuzz import containers
import rotbits_jax
from rotbits_jax import checkpoints

TESTDATA = pathlib.Path(__file__).parent / 'testdata'


def _tensors(layers=3):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  tensors = {
    'wte.weight': draw(40, 16).astype(np.float16),
    'ln_f.weight': draw(16).astype(np.float32),
    'ln_f.bias': draw(16).astype(np.float32),
    'scale': np.float32(2),
    'none': np.zeros((0, 3), np.float16),
    'encoder/x': draw(3).astype(np.float16),
    'encoder/y': draw(3).astype(np.float16),
    'pruned.weight': (draw(64, 96) * (draw(64, 96) > 1)).astype(np.float16),
    'dequantised.weight': np.float32(rng.integers(-7, 8, (96, 64)) * draw(96, 1)),
    'mask': np.tri(96, dtype=np.float32),
  }
  for i in range(layers):
    prefix = f'h.{i}'
    tensors |= {
      f'{prefix}.attn.weight': draw(16, 48).astype(ml_dtypes.bfloat16),
      f'{prefix}.attn.bias': np.tri(4, dtype=bool),
      f'{prefix}.steps': np.arange(4),
    }
  return tensors


FILES = {'config.json': '{"model_type": "gpt2"}', 'LICENSE': 'free', 'code/x.py': ''}


def _index(names):
  return json.dumps({'weight_map': names}, indent=3)


def _experts():
  prefix = 'model.layers.0.mlp'
  names = [f'{prefix}.experts.{i}.{x}_proj.weight' for i in (0, 10) for x in 'ab']
  names += [f'{prefix}.gate.weight', 'model.layers.0.norm.weight', 'lm_head.weight']
  return {name: np.ones((2, 3), np.float16) for name in names}


# Checkpoints: the tensors of each weights file, and the other files.
CHECKPOINTS = {
  'one file': ({'model.safetensors': _tensors()}, FILES),
  'no config': ({'x.safetensors': _tensors()}, {}),
  'experts': ({'model.safetensors': _experts()}, FILES),
  'shards': (
    {
      'model-1.safetensors': dict([*_tensors().items()][::2]),
      'model-2.safetensors': dict([*_tensors().items()][1::2]),
    },
    FILES
    | {
      'model.safetensors.index.json': _index(
        {x: f'model-{i % 2 + 1}.safetensors' for i, x in enumerate(_tensors())}
      )
    },
  ),
  'float8': (
    {'model.safetensors': {'a.b': np.zeros(9, ml_dtypes.float8_e5m2), 'c': np.ones(2)}},
    FILES,
  ),
}


def _write(folder, name):
  """Writes one of the checkpoints; returns its folder."""
  weights, files = CHECKPOINTS[name]
  for file in (*weights, *files):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
  for file, tensors in weights.items():
    weights_files.write_safetensors(folder / file, tensors)
  for file, text in files.items():
    (folder / file).write_text(text)
  if name == 'float8':  # a dtype that NumPy lacks, and metadata
    path = folder / 'model.safetensors'
    data = path.read_bytes().replace(b'F8_E5M2', b'F8_E8M0')
    path.write_bytes(data.replace(b'"format":"pt"', b'"format":"tp"'))
  return folder


def _contents(folder):
  files = [x for x in folder.rglob('*') if x.is_file()]
  return {x.relative_to(folder): x.read_bytes() for x in files}


@pytest.mark.parametrize('name', CHECKPOINTS)
@pytest.mark.parametrize('options', [{}, {'shard_size': 2000}])
def test_files_come_back_byte_for_byte(tmp_path, name, options):
  source, path = _write(tmp_path / 'in', name), tmp_path / 'x'
  rotbits_jax.encode_to_file(source, path, check=True, **options)
  rotbits_jax.decode_to_directory(path, tmp_path / 'out')
  assert _contents(tmp_path / 'out') == _contents(source)
  assert rotbits_jax.verify(path, against=source).same_bits
  for tensor in checkpoints.open_plain(source).tensors:
    rotbits_jax.read_tensor(path, tensor)


def test_many_tensors_of_one_element_are_no_larger_than_their_file(tmp_path):
  tensors = {f't.{i}': np.float32([i]) for i in range(5000)}
  source = tmp_path / 'model.safetensors'
  weights_files.write_safetensors(source, tensors)
  data = rotbits_jax.encode(source)
  assert len(data) < source.stat().st_size / 3
  rotbits_jax.decode_to_directory(data, tmp_path / 'out')
  assert (tmp_path / 'out' / source.name).read_bytes() == source.read_bytes()


def test_an_expert_is_a_record():
  with tempfile.TemporaryDirectory() as folder:
    opened = checkpoints.open_plain(_write(pathlib.Path(folder), 'experts'))
  prefix = 'model.layers.0'
  experts = [f'{prefix}.mlp.experts.{i}' for i in (0, 10)]
  assert {*opened.records} == {prefix, 'lm_head', *experts}


def test_a_base_of_plain_tensors(tmp_path):
  base, tuned = (_write(tmp_path / x, 'one file') for x in ('base', 'tuned'))
  weights = tuned / 'model.safetensors'
  tensors = _tensors() | {'ln_f.bias': np.ones(16, np.float32)}
  weights_files.write_safetensors(weights, tensors)
  rotbits_jax.encode_to_file(tuned, tmp_path / 'x', base=base)
  rotbits_jax.encode_to_file(base, tmp_path / 'base.rotbits')
  for path in (base, tmp_path / 'base.rotbits'):
    options = {'base': path, 'overwrite': True}
    rotbits_jax.decode_to_directory(tmp_path / 'x', tmp_path / 'out', **options)
    assert _contents(tmp_path / 'out') == _contents(tuned)
    assert rotbits_jax.verify(tmp_path / 'x', against=tuned, base=path).same_bits


def test_near_rounds_each_matrix_and_says_that_nothing_was_measured(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    dtype: rng.normal(size=(64, 96)).astype(jnp.dtype(dtype))
    for dtype in ('float16', 'bfloat16', 'float32')
  }
  tensors |= {'norm': np.ones(96, np.float32), 'steps': np.arange(6).reshape(2, 3)}
  (tmp_path / 'in').mkdir()
  weights_files.write_safetensors(tmp_path / 'in' / 'model.safetensors', tensors)
  path = tmp_path / 'x'
  rotbits_jax.encode_to_file(tmp_path / 'in', path, preset='near', step=-4.0)
  rotbits_jax.decode_to_directory(path, tmp_path / 'out')
  found = weights_files.read_safetensors(tmp_path / 'out' / 'model.safetensors')
  for name, tensor in tensors.items():
    assert found[name].dtype == tensor.dtype
    error = np.abs(found[name].astype(np.float64) - tensor.astype(np.float64))
    assert error.max() <= 2**-4.9 + 2**-7
    assert (error.max() > 0) == (name in ('float16', 'bfloat16', 'float32'))
  assert path.stat().st_size < 3 * 64 * 96
  assert 'No divergence was measured' in ' '.join(rotbits_jax.inspect(path).remarks())
  assert not rotbits_jax.verify(path, against=tmp_path / 'in').same_bits


def test_headers_that_lie_are_refused(tmp_path):
  source = _write(tmp_path / 'in', 'one file')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  streams, manifest = containers.unpack((tmp_path / 'x').read_bytes())
  (name,) = manifest['headers']
  header = zlib.decompress(streams[f'headers/{name}'])
  for changed in (
    header.replace(b'wte.weight', b'wtf.weight'),
    header.replace(b'"shape":[16]', b'"shape":[61]'),
    header.replace(b'"dtype":"F32"', b'"dtype":"I32"'),
    header[:-1],
    b'',
  ):
    packed = zlib.compress(changed)
    manifest['headers'] = {name: [len(packed), zlib.crc32(packed), len(changed)]}
    lying = streams | {f'headers/{name}': packed}
    data = containers.pack(lying, containers.to_json(manifest))
    with pytest.raises(rotbits_jax.ContainerError):
      rotbits_jax.decode_to_directory(data, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_another_checkpoint_is_not_what_was_encoded(tmp_path):
  source = _write(tmp_path / 'in', 'one file')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  weights = source / 'model.safetensors'
  data = weights.read_bytes()
  for changed in (
    data[:-1] + bytes([data[-1] ^ 1]),
    data.replace(b'"format":"pt"', b'"format":"tp"'),
  ):
    weights.write_bytes(changed)
    with pytest.raises(rotbits_jax.ContainerError, match='differ'):
      rotbits_jax.verify(tmp_path / 'x', against=source)
