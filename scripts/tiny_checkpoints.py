"""Makes the tiny random checkpoints of tests/testdata that transformers computes.

  python -m scripts.tiny_checkpoints FOLDER NAME ...

It needs PyTorch and transformers, see `scripts/transformers.sh`. The numbers are large
enough that every switch of a family changes the logits: windows are shorter than the
sequences, and soft caps bend the scores.
"""

import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {
  'vocab_size': 61,
  'hidden_size': 32,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 48,
  'max_position_embeddings': 64,
  'pad_token_id': None,
  'bos_token_id': 1,
  'eos_token_id': 2,
}
WINDOWS = {'head_dim': 12, 'query_pre_attn_scalar': 10, 'sliding_window': 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  'qwen3-tiny-dense': ('qwen3', {'head_dim': 12}),
  'mixtral-tiny-dense': (
    'mixtral',
    {'num_hidden_layers': 2, 'num_local_experts': 4, 'sliding_window': 5},
  ),
  'qwen3-moe-tiny-dense': (
    'qwen3_moe',
    {
      'num_hidden_layers': 2,
      'head_dim': 12,
      'num_experts': 6,
      'num_experts_per_tok': 3,
      'moe_intermediate_size': 20,
    },
  ),
  'smollm3-tiny-dense': ('smollm3', {}),
  'gemma2-tiny-dense': (
    'gemma2',
    WINDOWS | {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 3.0},
  ),
  'gemma3-tiny-dense': (
    'gemma3_text',
    WINDOWS
    | {
      'layer_types': [
        *['sliding_attention'] * 2,
        'full_attention',
        'sliding_attention',
      ],
      'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e4},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 50.0},
      },
    },
  ),
}


def make(name: str, folder: pathlib.Path) -> None:
  """Saves a model and its logits."""
  family, settings = MODELS[name]
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(family, **SIZES | settings)
  model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for path, parameter in model.named_parameters():
      # Sharp routers: where rounding swaps the last expert of a token for another, the
      # weight of both is small.
      scale = 12 if path.endswith('mlp.gate.weight') else 1.5
      deviation = 0.3 if parameter.ndim == 1 else scale * parameter.shape[-1] ** -0.5
      parameter.normal_(0, deviation).add_(parameter.ndim == 1)
  model.to(torch.bfloat16).save_pretrained(folder / name)
  (folder / name / 'model.safetensors').chmod(0o644)
  # Loaded again, because RoPE's frequencies are rounded to bfloat16 with the weights.
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / name,
    dtype='float32',
    attn_implementation='eager',  # the only one with soft caps
  )
  tokens = torch.randint(3, SIZES['vocab_size'], (2, 24))
  with torch.no_grad():
    logits = model.eval()(tokens).logits
  np.savez_compressed(
    folder / name / 'ref_logits.npz',
    input_ids=tokens.numpy().astype(np.int32),
    logits=logits.numpy(),
  )


if __name__ == '__main__':
  for chosen in sys.argv[2:]:
    make(chosen, pathlib.Path(sys.argv[1]))
