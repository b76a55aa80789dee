"""Makes the tiny random checkpoints of tests/testdata that transformers computes.

  python -m scripts.tiny_checkpoints FOLDER NAME ...

It needs PyTorch and transformers, see `scripts/transformers.sh`. The weights are large
enough that every switch of a family changes the logits.
"""

import json
import pathlib
import string
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
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  'qwen3-tiny-dense': ('qwen3', {'head_dim': 12}),
}

# One token for each letter and mark; the 61 of `vocab_size`.
TOKENS = ['<unk>', '<s>', '</s>', *" \n.,'-", *string.ascii_letters]
TOKENIZER = {
  'version': '1.0',
  'added_tokens': [],
  'pre_tokenizer': {
    'type': 'Split',
    'pattern': {'Regex': r'[\s\S]'},
    'behavior': 'Isolated',
    'invert': False,
  },
  'model': {
    'type': 'WordLevel',
    'vocab': {token: index for index, token in enumerate(TOKENS)},
    'unk_token': '<unk>',
  },
}


def make(name: str, folder: pathlib.Path) -> None:
  """Saves a model and its logits."""
  family, settings = MODELS[name]
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(family, **SIZES | settings)
  model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for parameter in model.parameters():
      deviation = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
      parameter.normal_(0, deviation).add_(parameter.ndim == 1)
  model.to(torch.bfloat16).save_pretrained(folder / name)
  (folder / name / 'model.safetensors').chmod(0o644)
  (folder / name / 'tokenizer.json').write_text(f'{json.dumps(TOKENIZER)}\n')
  # Loaded again, because RoPE's frequencies are rounded to bfloat16 with the weights.
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / name,
    dtype='float32',
    attn_implementation='eager',
  )
  tokens = torch.randint(3, SIZES['vocab_size'], (2, 24))
  with torch.no_grad():
    logits = model.eval()(tokens).logits
  np.savez_compressed(
    folder / 'logits' / f'{name}.npz',
    input_ids=tokens.numpy().astype(np.int32),
    logits=logits.numpy(),
  )


if __name__ == '__main__':
  for chosen in sys.argv[2:]:
    make(chosen, pathlib.Path(sys.argv[1]))
