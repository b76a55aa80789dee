"""Checks that decoded checkpoints, dense and sliced, run in transformers.

  bash scripts/transformers.sh [VERSION]

Dense: tiny random models are saved by transformers and encoded, and transformers loads
what was decoded. With `exact` all logits must be the same bits, also for families that
the package does not know; with `free` they differ by rounding only.

Sliced: Microsoft's checkpoints in tests/testdata are decoded in the format
`transformers`. Logits must be those of our forward pass, and Microsoft's; tokens with
the cache those without; a saved copy must load, and all parameters have gradients.

It is not in the suite because it needs PyTorch.
"""

import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
import transformers

import rotbits_jax
from rotbits_jax import models

TESTDATA = pathlib.Path(__file__).parents[1] / 'tests' / 'testdata'
SIZES = {
  'vocab_size': 96,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'intermediate_size': 64,
  'max_position_embeddings': 64,
}
GROUPS = SIZES | {'num_key_value_heads': 2}
OPT = {key: x for key, x in SIZES.items() if key != 'intermediate_size'}
KNOWN = {
  'llama': GROUPS,
  'mistral': GROUPS | {'sliding_window': 32},
  'qwen2': GROUPS,
  'qwen3': GROUPS | {'head_dim': 8},
  'phi': SIZES,
  'phi3': GROUPS | {'pad_token_id': 0},
  'opt': OPT | {'ffn_dim': 64, 'word_embed_proj_dim': 32},
}
OTHERS = {
  'gpt2': {
    'vocab_size': 96,
    'n_embd': 32,
    'n_layer': 2,
    'n_head': 4,
    'n_positions': 64,
  },
  'gemma2': GROUPS | {'head_dim': 8},
  'mixtral': GROUPS | {'num_local_experts': 4},
}
MOST_ROUNDING = 2e-2  # of the greatest logit, after rounding to bfloat16
MOST_ERROR = 1e-5  # of the greatest logit, in float32


def error(actual: Any, expected: Any) -> float:
  """Returns the greatest difference relative to the greatest expected value."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  return float(np.abs(actual - expected).max() / np.abs(expected).max())


def load(path: pathlib.Path, **options: Any) -> Any:
  """Loads a model in float32."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, trust_remote_code=True, **options
  ).eval()


def logits_of(model: Any, tokens: torch.Tensor) -> np.ndarray:
  """Returns the logits of a model of transformers."""
  with torch.no_grad():
    return model(tokens, use_cache=False).logits.numpy()


def check_dense(family: str, sizes: dict[str, Any], preset: str) -> str:
  """Checks a random model; returns the error."""
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(family, **sizes)
  model = transformers.AutoModelForCausalLM.from_config(config)
  tokens = torch.arange(40)[None]
  with tempfile.TemporaryDirectory() as folder:
    source, file, output = (pathlib.Path(folder, x) for x in ('in', 'file', 'out'))
    model.to(torch.bfloat16).save_pretrained(source)
    rotbits_jax.encode_to_file(source, file, preset=preset)
    rotbits_jax.decode_to_directory(file, output)
    expected, actual = (logits_of(load(x), tokens) for x in (source, output))
    missing = {x.name for x in source.iterdir()} - {x.name for x in output.iterdir()}
  assert not missing, f'{family}: {missing} did not come back'
  found = error(actual, expected)
  assert found <= (0.0 if preset == 'exact' else MOST_ROUNDING), (family, found)
  return f'logits {found:.1e}'


def check_sliced(name: str, preset: str) -> str:
  """Checks one of Microsoft's models; returns the errors."""
  reference = np.load(TESTDATA / 'logits' / f'{name}.npz')
  tokens = torch.tensor(reference['input_ids']).long()
  with tempfile.TemporaryDirectory() as folder:
    file, output, copy = (pathlib.Path(folder, x) for x in ('file', 'out', 'copy'))
    rotbits_jax.encode_to_file(TESTDATA / name, file, preset=preset)
    rotbits_jax.decode_to_directory(file, output, format='transformers')
    expected = {'ours': our_logits(file, reference['input_ids'])}
    if preset == 'exact':
      expected["Microsoft's"] = reference['logits']
    errors = {}
    for attention in ('eager', 'sdpa'):
      model = load(output, attn_implementation=attention)
      for whose, logits in expected.items():
        errors[whose, attention] = error(logits_of(model, tokens), logits)
    errors['with the cache', ''] = cache_error(model, tokens)
    model.save_pretrained(copy)
    errors['a copy', ''] = error(logits_of(load(copy), tokens), expected['ours'])
    check_gradients(model, tokens)
  worst = max(errors, key=errors.__getitem__)
  assert errors[worst] <= MOST_ERROR, f'{name}, {preset}, {worst}: {errors[worst]:.2g}'
  return f'at most {errors[worst]:.1e}, {" ".join(worst).strip()}'


def our_logits(file: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
  """Returns the logits of our forward pass on the weights that a folder has."""
  model = rotbits_jax.decode(file)
  arrays = model.materialize()
  same = models.from_layers(model.config, arrays.outer(), [*arrays.layers()])
  return np.asarray(models.logits(same, tokens))


def cache_error(model: Any, tokens: torch.Tensor) -> float:
  """Returns how far logits of one token at a time are from those of all at once."""
  prompt = tokens[:, :8]
  model.generation_config.eos_token_id = None
  generated = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    pad_token_id=0,
    max_new_tokens=12,
    do_sample=False,
    return_dict_in_generate=True,
    output_logits=True,
  )
  at_once = logits_of(model, generated.sequences)[:, prompt.shape[1] - 1 : -1]
  return error(torch.stack(generated.logits, 1), at_once)


def check_gradients(model: Any, tokens: torch.Tensor) -> None:
  """Raises `AssertionError` if a parameter has no finite gradient."""
  model(tokens, labels=tokens, use_cache=False).loss.backward()
  for name, parameter in model.named_parameters():
    assert parameter.grad is not None, name
    assert parameter.grad.isfinite().all(), name


def main() -> int:
  transformers.logging.disable_progress_bar()
  for family, sizes in KNOWN.items():
    for preset in ('exact', 'free'):
      print(f'{family}, {preset}: {check_dense(family, sizes, preset)}', flush=True)
  for family, sizes in OTHERS.items():
    print(f'{family}, exact: {check_dense(family, sizes, "exact")}', flush=True)
  for path in sorted(TESTDATA.glob('*sliced*')):
    for preset in ('exact', 'free'):
      print(f'{path.name}, {preset}: {check_sliced(path.name, preset)}', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
