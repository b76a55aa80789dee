"""Checks that decoded checkpoints load in transformers and give the same logits.

  bash scripts/transformers.sh

Tiny random models are saved by transformers and encoded, and transformers loads their
snapshots. With `exact` all logits must be the same bits, for families that the
package knows and for others, which it stores as plain tensors. With `free` they must
differ by rounding only. It stands beside the suite because it needs PyTorch.
"""

import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import torch
import transformers

import rotbits_jax

SIZES = {
  'vocab_size': 96,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'intermediate_size': 64,
  'max_position_embeddings': 64,
}
GROUPS = SIZES | {'num_key_value_heads': 2}
KNOWN = {
  'llama': GROUPS,
  'mistral': GROUPS | {'sliding_window': 32},
  'qwen2': GROUPS,
  'qwen3': GROUPS | {'head_dim': 8},
  'phi': SIZES,
  'phi3': GROUPS | {'pad_token_id': 0},
  'opt': {
    **{k: v for k, v in SIZES.items() if k != 'intermediate_size'},
    'ffn_dim': 64,
    'word_embed_proj_dim': 32,
  },
}
OTHERS = {
  'gpt2': {
    'vocab_size': 96,
    'n_embd': 32,
    'n_layer': 2,
    'n_head': 4,
    'n_positions': 64,
  },
  'gemma': GROUPS | {'head_dim': 8},
  'olmoe': GROUPS | {'num_experts': 4, 'num_experts_per_tok': 2},
}
MOST_ERROR = 2e-2  # of logits of size 1, after rounding to bfloat16


def to_json(value: Any) -> bytes:
  return json.dumps(value).encode()


def logits(path: pathlib.Path) -> torch.Tensor:
  """Returns the logits of the checkpoint in a directory for some tokens."""
  model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype='float32')
  with torch.no_grad():
    return model.eval()(torch.arange(40)[None] % 96).logits


def check(family: str, sizes: dict[str, int], preset: str) -> str:
  """Returns what was found, and raises `AssertionError` if logits differ."""
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(family, **sizes)
  model = transformers.AutoModelForCausalLM.from_config(config)
  with tempfile.TemporaryDirectory() as folder:
    given, file = pathlib.Path(folder, 'in'), pathlib.Path(folder, 'x')
    model.to(torch.bfloat16).save_pretrained(given)
    rotbits_jax.encode_to_file(given, file, preset=preset)
    os.environ['ROTBITS_JAX_CACHE'] = folder
    again = rotbits_jax.snapshot(file)
    expected, actual = logits(given), logits(again)
    named = {path.name for path in given.iterdir()} - {x.name for x in again.iterdir()}
  assert not named, f'{family}: {named} did not come back'
  error = float((expected - actual).abs().max() / expected.abs().max())
  most = 0.0 if preset == 'exact' else MOST_ERROR
  assert error <= most, f'{family}, {preset}: logits are off by {error:.2g}'
  return f'{family:10}{preset:8}error {error:.2g}'


def main() -> int:
  for family, sizes in KNOWN.items():
    for preset in ('exact', 'free'):
      print(check(family, sizes, preset), flush=True)
  for family, sizes in OTHERS.items():
    print(check(family, sizes, 'exact'), flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
