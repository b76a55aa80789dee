"""Small inputs of every kind, which the fuzzer and the sweep begin with."""

import functools
import io
import json
import os
import pathlib
import struct
import tempfile
from typing import Any
import zipfile

import jax
import numpy as np

from fuzz import gguf_parts
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.relative import measure as relative
from rotbits_jax.slicing import norm_fusion
from rotbits_jax.slicing import slicegpt

LLAMA: dict[str, Any] = {
  'model_type': 'llama',
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'vocab_size': 48,
  'max_position_embeddings': 32,
}
MIXTURE = LLAMA | {
  'model_type': 'mixtral',
  'rms_norm_eps': 1e-5,
  'sliding_window': None,
  'num_local_experts': 3,
  'num_experts_per_tok': 2,
}
OPT: dict[str, Any] = {
  'model_type': 'opt',
  'hidden_size': 16,
  'word_embed_proj_dim': 16,
  'ffn_dim': 24,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'vocab_size': 48,
  'max_position_embeddings': 14,
}
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
  dense = checkpoints.parse_config(config_json, None)
  config = dense.sliced_to((width,) * len(dense.segment_widths))
  rng = np.random.default_rng(seed)

  def draw(path: Any, shape: tuple[int, ...]) -> np.ndarray:
    if 'shortcut' in path[0].key:
      whole = np.linalg.qr(rng.standard_normal((config.hidden_size,) * 2))[0]
      return whole[: shape[0], : shape[1]].astype(np.float16)
    return (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float16)

  fill = functools.partial(
    jax.tree_util.tree_map_with_path, draw, is_leaf=lambda x: isinstance(x, tuple)
  )
  outer = fill(models.outer_shapes(config))
  head = np.float32(outer['head']['kernel'])
  image = head.T @ rng.standard_normal((width, width)).astype(np.float32)
  outer['embed']['tokens'] = image.astype(np.float16)
  layers = [fill(models.layer_shapes(config, i)) for i in range(config.num_layers)]
  return models.from_layers(config, outer, layers)


def dense_model(config_json: dict[str, Any], *, seed: int = 0) -> models.Model:
  """Makes a random dense model in float16."""
  config = checkpoints.parse_config(config_json, None)
  rng = np.random.default_rng(seed)
  draw = lambda shape: np.asarray(rng.standard_normal(shape) / 3, np.float16)
  fill = functools.partial(jax.tree.map, draw, is_leaf=lambda x: isinstance(x, tuple))
  layers = [fill(models.layer_shapes(config, i)) for i in range(config.num_layers)]
  return models.from_layers(config, fill(models.outer_shapes(config)), layers)


def sliced_from(
  dense: models.Model, widths: tuple[int, ...], dtype: Any = np.float16, seed: int = 0
) -> models.Model:
  """Slices a model with random subspaces, without a text."""
  rng, config = np.random.default_rng(seed), norm_fusion.fused(dense.config)
  hidden, step = config.hidden_size, config.segments_per_layer
  whole = (np.linalg.qr(rng.standard_normal((hidden, hidden)))[0] for _ in widths)
  bases = [x[:, :n] for x, n in zip(whole, widths, strict=True)]
  embed = norm_fusion.fuse_embeddings(dense.outer(), dense.config)
  head = norm_fusion.fuse_head(dense.outer(), dense.config)
  head['kernel'] = bases[-1].T @ head['kernel']
  outer = {'embed': {k: x @ bases[0] for k, x in embed.items()}, 'head': head}
  layers = [
    slicegpt.slice_layer(
      norm_fusion.fuse_layer(layer, dense.config),
      tuple(bases[i * step : (i + 1) * step + 1]),
      config,
    )
    for i, layer in enumerate(dense.layers())
  ]
  outer, layers = jax.tree.map(lambda x: x.astype(dtype), (outer, layers))
  return models.from_layers(config.sliced_to(widths), outer, layers)


@functools.cache
def base() -> dict[str, Any]:
  """Returns the base of `containers_beside_base`: a dense model, and other arrays."""
  dense = dense_model(OPT | {'hidden_size': 32, 'word_embed_proj_dim': 32})
  layers = {models.names.layer(i): x for i, x in enumerate(dense.layers())}
  arrays = {name: array for name, (_, array) in leaves_beside_base().items()}
  return {**dense.outer(), **layers, 'arrays': arrays}


@functools.cache
def containers_beside_base() -> dict[str, bytes]:
  """Encodes arrays and a sliced model beside `base`."""
  dense = dense_model(OPT | {'hidden_size': 32, 'word_embed_proj_dim': 32})
  model = sliced_from(dense, (24, 28, 32))
  arrays = {
    name: leaf.materialize(array)
    for name, (leaf, array) in leaves_beside_base().items()
  }
  return {
    'arrays beside a base': rotbits_jax.encode({'arrays': arrays}, base=base()),
    **{
      f'{preset} beside a base': rotbits_jax.encode(model, preset=preset, base=dense)
      for preset in ('exact', 'free')
    },
  }


def low_rank_model() -> models.Model:
  """Makes the sliced Llama with a kernel of rank 3 as two factors."""
  model = sliced_model(LLAMA)
  (layer,) = model.layers()
  kernel = layer['mlp']['up']['kernel']
  ones = np.ones((3, kernel.shape[1]), np.float16)
  layer['mlp']['up'] = {'kernel': structured.LowRank(kernel[:, :3], ones, names='asvd')}
  return models.from_layers(model.config, model.outer(), [layer])


def presets_of_sweep() -> dict[str, presets.Preset]:
  """Returns every preset, and variants whose files other code reads."""
  found = {name: presets.make(name) for name in presets.PRESETS}
  published: dict[str, Any] = {
    'canonicalizer': 'svd',
    'rotation_codec': 'symmetric_eig',
  }
  found['paper-published'] = presets.paper(**published, correction='threshold')
  found['paper-entropy'] = presets.paper(canonicalizer='qr', entropy=True)
  return found


@functools.cache
def container(name: str, seed: int = 0) -> bytes:
  """Encodes a small sliced Llama with a preset, or a checkpoint as plain tensors.

  Args:
    name: name of the preset in `presets_of_sweep`, or `PLAIN`.
    seed: seed of the numbers.
  """
  if name == PLAIN:
    return _plain_tensors(seed)
  model, preset = sliced_model(LLAMA, seed=seed), presets_of_sweep()[name]
  return rotbits_jax.encode(model, preset=preset, files=FILES, stem='tiny')


def transforms() -> dict[str, passes.Transform]:
  """Returns all transforms of the package, by name."""
  found = (
    passes.remove_residual_gauge(),
    passes.retie_embedding(),
    passes.remove_biases(),
    passes.remove_value_gauge(),
    passes.remove_query_key_gauge(),
    passes.remove_low_rank_gauge(),
    passes.random_rotation(key=jax.random.key(1)),
    passes.retie_exactly(),
  )
  return {transform.name: transform for transform in found}


def leaves() -> dict[str, Any]:
  """Returns a structured leaf of every kind that needs no other parameter."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: np.asarray(rng.standard_normal(shape), np.float16)
  lower = lambda rows, columns: np.tril(normal(rows, columns))
  return {
    'gram': structured.IdentityMinusGram(lower(6, 3), lower(6, 1), columns=9),
    'gram_of_rank_0': structured.IdentityMinusGram(lower(6, 0), lower(6, 0), columns=6),
    'trapezoidal_rows': structured.TrapezoidalRows(normal(2, 8), lower(8, 5)),
    'head_columns': structured.HeadColumns(normal(7, 8), normal(4, 6), heads=2),
    'head_rows': structured.HeadRows(normal(6, 2), normal(12, 5), groups=2, head_dim=3),
    'constant': structured.Constant.like(normal(3, 4), 1.5),
    'low_rank': structured.LowRank(normal(6, 2), normal(2, 5), names='asvd'),
    'reduced': structured.ReducedLowRank(
      normal(3, 2), normal(2, 7), size=5, transposed=True, names='factors'
    ),
    'reduced_lines': structured.ReducedLowRank(
      normal(3, 2),
      normal(2, 7),
      size=5,
      transposed=True,
      basis_exponents=np.arange(-2, 3, dtype=np.int8),
      other_exponents=np.arange(7, dtype=np.int8),
    ),
    'tied': structured.Tied(normal(5, 3), tokens=9),
    'quantized': structured.Quantized(
      rng.integers(0, 16, (6, 64)).astype(np.uint8),
      rng.integers(0, 64, (6, 4)).astype(np.uint8),
      rng.integers(0, 64, (6, 4)).astype(np.uint8),
      normal(6, 2),
      normal(6, 2),
      name='bfloat16',
      transposed=True,
    ),
    'multiples': structured.UniformlyQuantized(
      rng.integers(-900, 900, (6, 5)).astype(np.int16),
      np.float32(0.625),
      'float16',
      rng.integers(-9, 9, 6).astype(np.int8),
      rng.integers(-9, 9, 5).astype(np.int8),
    ),
    'basis': structured.Basis(rng.integers(-90, 90, (6, 4)).astype(np.int32), 1 << 17),
    # The mask is a byte 1, as in the target, whose arrays have ones.
    'subspace': structured.Subspace.of(
      0.2 * normal(7, 1).astype(np.float64), np.arange(8) == 0, 1 << 10
    ),
  }


def leaves_beside_base() -> dict[str, tuple[Any, np.ndarray]]:
  """Returns a leaf of every kind that needs an array of a base, and the array."""
  rng = np.random.default_rng(0)
  base = rng.standard_normal((80, 128)).astype(np.float16)
  near = (base + 0.01 * rng.standard_normal(base.shape)).astype(np.float16)
  near[0, :3] = 100, -100, np.inf
  few = base.copy()
  few[3, :9] = near[3, :9]
  decayed = (0.98 * base.astype(np.float32)).astype(np.float16)
  arrays = {'relative': near, 'decayed': decayed, 'patched': few, 'same': base}
  return {name: (relative.beside(x, base), base) for name, x in arrays.items()}


@functools.cache
def containers_of_trees() -> dict[str, bytes]:
  """Encodes PyTrees whose arrays are stored in all possible ways."""
  rng = np.random.default_rng(1)
  normal = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)
  arrays = {
    'coded': {
      'half': normal(48, 64).astype(np.float16),
      'short': np.float32(normal(32, 40).astype(np.float16)),
      'integers': rng.integers(-9, 9, (2000,)).astype(np.int8),
      'wide': rng.integers(0, 3000, (40, 50)).astype(np.int32),
      'zeros': np.zeros((50, 60), np.float16),
    },
    'raw': {'double': np.arange(3.0), 'flags': np.array([True, False]), 'x': normal()},
    'empty': {'none': np.zeros((0, 3), np.float16), 'dict': {}},
  }
  steps = rng.integers(-7, 8, (64, 128)) * np.repeat([0.5, 0.25, 0.125, 1], 16)[:, None]
  few = {
    'levels': steps.astype(np.float16),
    'pruned': np.where(rng.random((64, 128)) < 0.1, normal(64, 128), np.float32(0)),
  }
  own = {  # without bases, which only models have
    name: leaf
    for name, leaf in leaves().items()
    if not isinstance(leaf, structured.Basis | structured.Subspace)
  }
  return {
    'arrays': rotbits_jax.encode(arrays, preset='exact', files=FILES),
    'leaves': rotbits_jax.encode({'leaves': own}, preset='exact'),
    'few numbers': rotbits_jax.encode(few, preset='exact'),
    PLAIN: container(PLAIN),
  }


def _plain_tensors(seed: int) -> bytes:
  """Encodes a checkpoint of an unknown family."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    (path / 'config.json').write_bytes(b'{"model_type": "unknown"}')
    (path / 'model.safetensors').write_bytes(safetensors_files(seed)[0])
    source = checkpoints.open_tensors(path)
    rotbits_jax.encode_to_file(source, path / 'x.rotbits', preset='exact')
    return (path / 'x.rotbits').read_bytes()


@functools.cache
def containers_of_models() -> dict[str, bytes]:
  """Encodes models with every preset but `paper`."""
  model = sliced_model(OPT)
  found = {
    name: container(name) for name in presets_of_sweep() if not name.startswith('paper')
  }
  for name in ('free', 'exact'):
    found[f'opt {name}'] = rotbits_jax.encode(model, preset=name)
    found[f'low rank {name}'] = rotbits_jax.encode(low_rank_model(), preset=name)
  found['mixture'] = rotbits_jax.encode(dense_model(MIXTURE), preset='free')
  return found


def stored_leaves() -> list[bytes]:
  """Returns the settings and shapes of structured leaves, as JSON, and their heads."""
  found = []
  beside_base = [leaf for leaf, _ in leaves_beside_base().values()]
  for leaf in (*leaves().values(), *beside_base):
    settings, arrays = leaf.stored()
    shapes = {n: [np.dtype(x.dtype).name, list(x.shape)] for n, x in arrays.items()}
    if 'head' in arrays:  # bytes that are read when the leaf is made
      shapes['head'].append(arrays['head'].tolist())
    found.append({'type': leaf.type_name, 'settings': settings, 'arrays': shapes})
  with rotbits_jax.file.Reader(container('exact')) as reader:
    for leaf, specs in reader.records['embed'].leaf_specs():
      pairs = zip(leaf.arrays, specs, strict=True)
      shapes = {name: [x.dtype, list(x.shape)] for name, x in pairs}
      if leaf.type_name:  # predicted from the head
        value = {'type': leaf.type_name, 'settings': leaf.settings, 'arrays': shapes}
        found.append(value)
  return [json.dumps(value).encode() for value in found]


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
    specs = {name: lazy.TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}
    writer = torch_zip.TorchZipWriter(path, specs, 'x')
    for name, x in tensors.items():
      writer.add(name, lazy.row_major(x))
    writer.close()
    return [path.read_bytes()]


def nested_torch_files() -> list[bytes]:
  """Files whose state dict is inside other dicts, of which two are the same one."""
  found = []
  for data in torch_files():
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      members = {name: archive.read(name) for name in archive.namelist()}
    state = members['x/data.pkl'].removeprefix(b'\x80\2').removesuffix(b'.')
    key = lambda name: b'X' + struct.pack('<I', len(name)) + name
    members['x/data.pkl'] = b''.join(
      [b'\x80\2}(', key(b'model'), state, b'q\0', key(b'ema'), b'h\0u.']
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
      for name, content in members.items():
        archive.writestr(zipfile.ZipInfo(name), content)
    found.append(file.getvalue())
  return found


def safetensors_files(seed: int = 0) -> list[bytes]:
  """Safetensors files of random numbers."""
  header = {
    '__metadata__': {'format': 'pt'},
    'a': {'dtype': 'F16', 'shape': [2, 3], 'data_offsets': [0, 12]},
    'b': {'dtype': 'I64', 'shape': [1], 'data_offsets': [12, 20]},
    'c': {'dtype': 'F32', 'shape': [0, 4], 'data_offsets': [20, 20]},
  }
  text = json.dumps(header).encode()
  body = np.random.default_rng(seed).bytes(20)
  return [struct.pack('<Q', len(text)) + text + body]


def write_tensors(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes a safetensors file of float16 and int16; its time is always the same."""
  header, body = dict[str, Any](), b''
  for name, x in tensors.items():
    place = [len(body), len(body) + x.nbytes]
    dtype = {'f': 'F16', 'i': 'I16'}[x.dtype.kind]
    header[name] = {'dtype': dtype, 'shape': x.shape, 'data_offsets': place}
    body += x.tobytes()
  text = json.dumps(header).encode()
  path = folder / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', len(text)) + text + body)
  os.utime(path, ns=(0, 0))


def shards_of_checkpoint() -> dict[str, bytes]:
  """Returns the files of a checkpoint in two shards, by name."""
  files, weight_map = dict[str, bytes](), dict[str, str]()
  for shard, names in {'x.safetensors': 'ab', 'y.safetensors': 'c'}.items():
    header = {
      name: {'dtype': 'F16', 'shape': [2], 'data_offsets': [4 * i, 4 * i + 4]}
      for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    files[shard] = struct.pack('<Q', len(text)) + text + bytes(4 * len(names))
    weight_map |= dict.fromkeys(names, shard)
  index = {'metadata': {'total_size': 12}, 'weight_map': weight_map}
  return files | {'model.safetensors.index.json': json.dumps(index).encode()}


@functools.cache
def shards_of_container() -> dict[str, bytes]:
  """Returns the files of a container in several shards, by name."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    model = sliced_model(LLAMA)
    rotbits_jax.encode_to_file(model, path / 'x', preset='exact', shard_size=4000)
    return {file.name: file.read_bytes() for file in path.iterdir()}


def indices(files: dict[str, bytes]) -> list[bytes]:
  """Returns the index among the files of shards."""
  return [data for name, data in files.items() if name.endswith('.index.json')]


def gguf_files() -> list[bytes]:
  """Makes a GGUF file of a Llama with one layer, byte by byte."""
  u32 = lambda value: gguf_parts.number(4, struct.pack('<I', value))
  f32 = lambda value: gguf_parts.number(6, struct.pack('<f', value))
  tokens = [b'<s>', *(bytes([i]) for i in range(97, 112))]
  kinds = struct.pack(f'<{len(tokens)}i', 3, *[1] * (len(tokens) - 1))
  fields = {
    b'general.architecture': gguf_parts.string(b'llama'),
    b'llama.block_count': u32(1),
    b'llama.context_length': u32(32),
    b'llama.embedding_length': u32(8),
    b'llama.feed_forward_length': u32(8),
    b'llama.attention.head_count': u32(2),
    b'llama.attention.head_count_kv': u32(1),
    b'llama.attention.layer_norm_rms_epsilon': f32(1e-5),
    b'llama.rope.freq_base': f32(1e4),
    b'llama.vocab_size': u32(len(tokens)),
    b'tokenizer.ggml.model': gguf_parts.string(b'gpt2'),
    b'tokenizer.ggml.pre': gguf_parts.string(b'smollm'),
    b'tokenizer.ggml.tokens': gguf_parts.strings(tokens),
    b'tokenizer.ggml.token_type': gguf_parts.numbers(5, kinds),
    b'tokenizer.ggml.merges': gguf_parts.strings([b'a b']),
    b'tokenizer.ggml.bos_token_id': u32(0),
  }
  shapes = {
    'token_embd.weight': (16, 8),
    'output_norm.weight': (8,),
    **{
      f'blk.0.{name}.weight': shape
      for name, shape in {
        **dict.fromkeys(('attn_norm', 'ffn_norm'), (8,)),
        **dict.fromkeys(('attn_q', 'attn_output'), (8, 8)),
        **dict.fromkeys(('attn_k', 'attn_v'), (4, 8)),
        **dict.fromkeys(('ffn_gate', 'ffn_up', 'ffn_down'), (8, 8)),
      }.items()
    },
  }
  described, offset = b'', 0
  for name, shape in shapes.items():
    described += gguf_parts.text(name.encode())
    described += struct.pack(f'<I{len(shape)}Q', len(shape), *shape[::-1])
    described += struct.pack('<IQ', 1, offset)  # float16
    offset += -(-2 * int(np.prod(shape)) // 32) * 32
  body = np.random.default_rng(0).standard_normal(offset // 2).astype(np.float16)
  parts = gguf_parts.Parts(fields, len(shapes), described, body.tobytes())
  return [gguf_parts.pack(parts)]


def configs() -> list[bytes]:
  """Returns the JSON files of checkpoints: `config.json` and the slicing JSON."""
  rope = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0}
  rope |= {'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}
  kinds: dict[str, dict[str, Any]] = {
    'llama': {'rope_scaling': rope, 'rope_theta': 5e5, 'head_dim': 8},
    'mistral': {'sliding_window': 4096},
    'qwen2': {'layer_types': ['full_attention'], 'use_sliding_window': False},
    'phi3': {'rms_norm_eps': 1e-5, 'sliding_window': None},
    'qwen3': {'head_dim': 8, 'use_sliding_window': False},
    'smollm3': {'no_rope_layers': [0], 'use_sliding_window': False},
    'gemma2': {'head_dim': 8, 'sliding_window': 4, 'attn_logit_softcapping': 50.0},
    'gemma3_text': {'head_dim': 8, 'sliding_window': 4, 'sliding_window_pattern': 6},
    'phi': {'partial_rotary_factor': 0.5, 'layer_norm_eps': 1e-5},
  }
  found: list[dict[str, Any]] = [
    {'config': LLAMA | {'model_type': kind, 'eos_token_id': 2} | own, 'slicing': None}
    for kind, own in kinds.items()
  ]
  for config_json in (LLAMA, OPT):
    dense = checkpoints.parse_config(config_json, None)
    config = dense.sliced_to((12,) * len(dense.segment_widths))
    slicing = checkpoints.slicing_json(config)
    found.append({'config': config_json, 'slicing': slicing})
  return [json.dumps(value).encode() for value in found]
