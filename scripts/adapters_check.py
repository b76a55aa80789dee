"""Checks that PEFT's adapters fit the weights that `free` decodes.

  bash scripts/transformers.sh

Random adapters of all modules of tiny random models are saved by PEFT, carried by
`encode`, and loaded by PEFT on the decoded model. The logits must be those of the model
and the adapter as they were, up to rounding.
"""

import pathlib
import sys
import tempfile
from typing import Any

import peft
import torch
import transformers

import rotbits_jax
from scripts import transformers_check

TOKENS = torch.arange(3, 43)[None]
MOST_ERROR = 1e-4  # of logits of size 1, in float32


def make(family: str, sizes: dict[str, int]) -> Any:
  """Returns a random model with a random adapter."""
  config = transformers.AutoConfig.for_model(family, **sizes)
  model = transformers.AutoModelForCausalLM.from_config(config).float()
  linear = {
    name.rpartition('.')[2]
    for name, module in model.named_modules()
    # Adapters of experts are refused.
    if isinstance(module, torch.nn.Linear) and '.experts.' not in name
  }
  # The output projections of OPT and Phi multiply the biases of the values, too.
  targets = linear - {'out_proj', 'dense'} | {'embed_tokens'}
  if config.tie_word_embeddings:
    targets -= {'lm_head'}
  settings = peft.LoraConfig(
    r=3, lora_alpha=5, target_modules=sorted(targets), rank_pattern={'down_proj': 2}
  )
  adapted = peft.get_peft_model(model, settings)
  with torch.no_grad():
    for name, parameter in adapted.named_parameters():
      if parameter.ndim == 1:
        parameter.normal_(1, 0.3)
      else:
        parameter.normal_(0, 0.3 if 'lora_' in name else parameter.shape[1] ** -0.5)
  return adapted.eval()


def check(family: str, sizes: dict[str, int]) -> str:
  """Returns what was found, and raises `AssertionError` if logits differ."""
  torch.manual_seed(0)
  adapted = make(family, sizes)
  with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    given, lora, file, again = (
      pathlib.Path(folder, x) for x in ('in', 'a', 'x', 'out')
    )
    expected = adapted(TOKENS).logits
    adapted.save_pretrained(lora)
    with adapted.disable_adapter():
      without = adapted(TOKENS).logits
    adapted.unload().save_pretrained(given)
    rotbits_jax.encode_to_file(given, file, preset='free', adapters=[lora])
    rotbits_jax.decode_to_directory(file, again)
    model = transformers.AutoModelForCausalLM.from_pretrained(again, dtype='float32')
    actual = peft.PeftModel.from_pretrained(model, again / 'a').eval()(TOKENS).logits
  size = expected.abs().max()
  error = float((actual - expected).abs().max() / size)
  assert error <= MOST_ERROR, f'{family}: logits are off by {error:.2g}'
  change = float((without - expected).abs().max() / size)
  return f'{family:12}adapter {change:.2g}, error {error:.2g}'


def main() -> int:
  transformers.logging.disable_progress_bar()
  for family, sizes in transformers_check.KNOWN.items():
    print(check(family, sizes), flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
