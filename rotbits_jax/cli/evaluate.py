"""Measures the perplexity of a model on a text, and its divergence from a reference.

  rotbits evaluate SmolLM2-135M.rotbits --text=book.txt --against=SmolLM2-135M

A model is a checkpoint's folder, its weights file, or a file of `rotbits encode`, and
needs a tokenizer.json. --against also measures the mean KL divergence from another
model, and the expected agreement rate (EAR): the share of tokens on which both can
agree when they sample. The noise floor is the divergence of the other model from itself
after a random rotation and rounding.

JSON: the fields of `rotbits_jax.evaluation.Evaluation`.
"""

import math

from absl import flags
import jax

from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax.cli import program

_BASE, _AGAINST = program.shared('base', 'against')
_TEXT = flags.DEFINE_string('text', None, 'A text file in UTF-8.', required=True)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', None, 'Tokens to use.', 2)


def main(model: str) -> program.Result:
  checkpoint = program.read_model(model, _BASE.value)
  tokens = program.read_tokens(_TEXT.value, checkpoint.files)
  reference = rerounded = None
  if _AGAINST.value is not None:
    reference = program.read_model(_AGAINST.value, _BASE.value).model
    rerounded = passes.randomly_rotated(reference, key=jax.random.key(0))
  measured = evaluation.evaluate(
    checkpoint.model,
    tokens,
    reference=reference,
    rerounded=rerounded,
    max_tokens=_MAX_TOKENS.value,
    progress=True,
  )
  if not all(math.isfinite(number) for number in measured if number is not None):
    raise ValueError(f'{model}: the predictions are not finite')
  lines = [f'perplexity   {measured.perplexity:.4f} on {measured.tokens:,} tokens']
  if measured.kl is not None:
    lines += [
      f'KL           {measured.kl:.3g} from the reference',
      f'EAR          {measured.ear:.2%} of tokens agree with the reference',
      f'noise floor  {measured.kl_rerounded:.3g} by rotation and rounding',
    ]
  return measured._asdict(), '\n'.join(lines)
