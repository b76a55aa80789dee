"""Small inputs of every type, which the fuzzer, the sweep and tests begin with."""

import functools
import json
import pathlib
import tempfile
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import quantised as quantisers
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.structured import subspaces
from tests import cases
from tests import random_models
from tests import weights_files

TESTDATA = pathlib.Path(__file__).parents[1] / 'tests/testdata'

LLAMA: dict[str, Any] = random_models.BASE | {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 1,
  'vocab_size': 48,
  'max_position_embeddings': 32,
}
OPT: dict[str, Any] = {
  'model_type': 'opt',
  'hidden_size': 16,
  'ffn_dim': 24,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'vocab_size': 48,
  'max_position_embeddings': 14,
}
WIDE = OPT | {'hidden_size': 32}
FILES = {
  'config.json': b'{"model_type": "llama"}',
  'tiny.json': b'{}',
  'notes.txt': b'a' * 2000,
  'adapter/notes.txt': b'b',
}
PLAIN = 'plain tensors'


def sliced_model(
  config_json: dict[str, Any], *, width: int = 12, seed: int = 0
) -> models.Model:
  """Makes a random sliced model in float16 with a tied embedding."""
  widths = (width,) * len(checkpoints.parse_config(config_json).segment_widths)
  model = random_models.sliced(config_json, widths, np.float16, seed)
  outer = model.outer()
  product = np.random.default_rng(seed).standard_normal((width, width))
  product = np.float32(outer['head']['kernel']).T @ product
  outer['embed']['tokens'] = product.astype(np.float16)
  return models.from_layers(model.config, outer, list(model.layers()))


@functools.cache
def base() -> dict[str, Any]:
  """Returns the base of `containers_beside_base`: a dense model, and other arrays."""
  dense = random_models.random_model(WIDE, np.float16)
  layers = {models.names.layer(i): x for i, x in enumerate(dense.layers())}
  arrays = {name: array for name, (_, array) in cases.leaves_beside_base().items()}
  return {**dense.outer(), **layers, 'arrays': arrays}


@functools.cache
def containers_beside_base() -> dict[str, bytes]:
  """Encodes arrays and a sliced model beside `base`."""
  dense = random_models.random_model(WIDE, np.float16)
  model = random_models.sliced_from(dense, (24, 28, 32))
  arrays = {
    name: leaf.materialize(array)
    for name, (leaf, array) in cases.leaves_beside_base().items()
  }
  encode = functools.partial(rotbits_jax.encode, model, base=dense)
  return {
    'arrays beside a base': rotbits_jax.encode({'arrays': arrays}, base=base()),
    **{f'{x} beside a base': encode(preset=x) for x in ('exact', 'free')},
  }


def presets_of_sweep() -> dict[str, presets.Preset]:
  """Returns every preset, and variants whose files other code reads."""
  published = presets.paper(
    canonicalizer='svd', rotation_codec='symmetric_eig', correction='threshold'
  )
  return {name: presets.make(name) for name in presets.PRESETS} | {
    'paper-published': published,
    'paper-entropy': presets.paper(canonicalizer='qr', entropy=True),
  }


@functools.cache
def container(name: str, seed: int = 0) -> bytes:
  """Encodes a small sliced Llama with a preset of `presets_of_sweep`, or `PLAIN`."""
  if name != PLAIN:
    source = checkpoints.Checkpoint(sliced_model(LLAMA, seed=seed), FILES, 'tiny')
    return rotbits_jax.encode(source, preset=presets_of_sweep()[name])
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    (path / 'config.json').write_bytes(b'{"model_type": "unknown"}')
    (path / 'model.safetensors').write_bytes(safetensors_files(seed)[0])
    rotbits_jax.encode_to_file(path, path / 'x.rotbits', preset='exact')
    return (path / 'x.rotbits').read_bytes()


@functools.cache
def containers_of_trees() -> dict[str, bytes]:
  """Encodes PyTrees whose arrays are stored in all possible ways."""
  rng = np.random.default_rng(1)
  normal = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)
  arrays: Any = {
    'coded': {
      'half': normal(48, 64).astype(np.float16),
      'short': np.float32(normal(32, 40).astype(np.float16)),
      'integers': rng.integers(-9, 9, (2000,)).astype(np.int8),
      'wide': rng.integers(0, 3000, (40, 50)).astype(np.int32),
      'zeros': np.zeros((50, 60), np.float16),
      'pruned': np.where(rng.random((64, 128)) < 0.1, normal(64, 128), np.float32(0)),
    },
    'raw': {'double': np.arange(3.0), 'flags': np.array([True, False]), 'x': normal()},
    'empty': {'none': np.zeros((0, 3), np.float16), 'dict': {}},
  }
  of_trees = {  # without bases, which only models have
    name: leaf
    for name, leaf in cases.leaves().items()
    if not isinstance(leaf, subspaces.Basis)
  }
  return {
    'arrays': rotbits_jax.encode(checkpoints.Checkpoint(arrays, FILES, None)),
    'leaves': rotbits_jax.encode({'leaves': of_trees}, preset='exact'),
    PLAIN: container(PLAIN),
  }


@functools.cache
def container_of_opt(preset: str = 'free') -> bytes:
  """Encodes a small sliced OPT."""
  return rotbits_jax.encode(sliced_model(OPT), preset=preset)


@functools.cache
def uniform_leaves() -> bytes:
  """Encodes arrays that are rounded to multiples of steps."""
  normal = np.random.default_rng(4).standard_normal
  arrays = {
    'w': normal((16, 24)).astype(np.float32),
    'experts': normal((2, 12, 8)).astype(np.float16),
  }
  tree = {'a': arrays, 'b': normal((8, 24)).astype(np.float32)}
  return rotbits_jax.encode(tree, preset='near')


@functools.cache
def quantised() -> dict[str, bytes]:
  """Encodes an array of each grid that was quantised and dequantised."""
  normal = np.random.default_rng(5).standard_normal((128, 128))
  matrix = normal.astype(np.float32)
  e5m2 = quantisers.rounded(ml_dtypes.float8_e5m2)
  quantise = {
    name: quantisers.QUANTISERS[name]
    for name in ('int8, rows', 'float8_e4m3fn, a tensor', 'int4, groups of 128')
  } | {
    'float8_e5m2, rows': quantisers.through((1, 0), e5m2, 57344),
    'float4_e2m1fn, groups of 16': quantisers.QUANTISERS['NVFP4'],
    'int4, groups of 32 with minima': quantisers.q4_1,
  }
  return {
    name: rotbits_jax.encode({'x': function(matrix).astype(ml_dtypes.bfloat16)})
    for name, function in quantise.items()
  }


@functools.cache
def steps() -> list[dict[str, Any]]:
  """Returns arrays before and after a step of a training."""
  rng = np.random.default_rng(6)
  weights = rng.standard_normal((64, 96)).astype(np.float32)
  moved = weights.copy()
  moved[rng.random(weights.shape) < 0.01] += 0.5
  counts = np.arange(9)
  old = {'w': weights, 'b': np.zeros(96, np.float16), 'n': counts}
  return [old, old | {'w': moved, 'n': counts + 1}]


@functools.cache
def delta() -> bytes:
  """Returns the bytes from one of `steps` to the next."""
  old, new = steps()
  return rotbits_jax.delta(new, old)


@functools.cache
def shards() -> dict[str, bytes]:
  """Encodes a small sliced Llama as shards; returns these and their index by name."""
  source = checkpoints.Checkpoint(sliced_model(LLAMA), FILES, 'tiny')
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'shards')
    rotbits_jax.encode_to_file(source, path, preset='free', shard_size=3000)
    return {file.name: file.read_bytes() for file in path.iterdir()}


def containers_of_models() -> list[bytes]:
  """Encodes models with every preset."""
  of_opt = map(container_of_opt, ('free', 'exact'))
  return [*map(container, presets_of_sweep()), *of_opt]


def stored_leaves() -> list[bytes]:
  """Returns the settings and the shapes of the arrays of structured leaves, as JSON."""
  texts = []
  beside_base = [leaf for leaf, _ in cases.leaves_beside_base().values()]
  for leaf in (*cases.leaves().values(), *beside_base):
    settings, arrays = leaf.stored()
    shapes = {n: [np.dtype(x.dtype).name, list(x.shape)] for n, x in arrays.items()}
    entry = {'type': leaf.type_name, 'settings': settings, 'arrays': shapes}
    texts.append(json.dumps(entry).encode())
  return texts


def torch_files() -> list[bytes]:
  """Files as `torch.save` writes them."""
  rng = np.random.default_rng(0)
  tensors: dict[str, np.ndarray] = {
    'a.weight': rng.standard_normal((3, 4)).astype(np.float16),
    'a.bias': np.arange(4, dtype=np.int64),
    'none': np.zeros((0, 2), np.float32),
    'one': np.array(1.5),
  }
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'x.pt'
    weights_files.write_torch(path, tensors)
    return [path.read_bytes()]


def safetensors_files(seed: int = 0) -> list[bytes]:
  """Safetensors files of random numbers."""
  specs = {
    'a': checkpoints.TensorSpec((2, 3), np.dtype(np.float16)),
    'b': checkpoints.TensorSpec((1,), np.dtype(np.int64)),
    'c': checkpoints.TensorSpec((0, 4), np.dtype(np.float32)),
  }
  return [safetensors.header(specs) + np.random.default_rng(seed).bytes(20)]


def configs() -> list[bytes]:
  """Returns the JSON files of checkpoints: `config.json` and the slicing JSON."""
  paths = sorted(TESTDATA.glob('*-dense/config.json'))
  values: list[Any] = [{'config': json.loads(path.read_bytes())} for path in paths]
  for config_json in (LLAMA, OPT):
    dense = checkpoints.parse_config(config_json)
    sliced = dense.sliced_to((12,) * len(dense.segment_widths))
    values.append({'config': config_json, 'slicing': checkpoints.slicing_json(sliced)})
  return [json.dumps(value).encode() for value in values]
