"""Measures the perplexity of a model on a text, and its divergence from a reference.

  rotbits evaluate --model=DIR|FILE --text=FILE [--reference=DIR|FILE]
    [--base=DIR|FILE] [--max_tokens=N] [--json] [--verbose]

Example:

  rotbits evaluate --model=smollm2.rotbits --text=book.txt --reference=SmolLM2-135M

A model is a checkpoint's directory, its weights file, or a file that `rotbits encode`
wrote. With a reference, the mean KL divergence from its predictions is measured too,
and the expected agreement rate (EAR): the share of tokens that can be the same if both
models draw them, which is the sum over the vocabulary of the smaller probability. The
noise floor is the divergence that appears when the reference is merely rotated at
random and rounded to its dtype again. The model needs a tokenizer.json.

JSON:

  perplexity    exp of the mean cross entropy in nats
  tokens        count of the tokens that were predicted
  kl            mean KL divergence from the reference in nats, or null
  kl_rerounded  the noise floor in nats, or null
  ear           mean expected agreement rate, from 0 to 1, or null
"""

import math

import jax

from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax.cli import program
from rotbits_jax.file import shards

FLAGS = program.Flags()
_MODEL = FLAGS.add('model', 'The model to measure.', source=True, required=True)
_BASE = FLAGS.bases()
_TEXT = FLAGS.add('text', 'A text file in UTF-8.', required=True)
_REFERENCE = FLAGS.add(
  'reference', 'The model to compare predictions with.', source=True
)
_MAX_TOKENS = FLAGS.add(
  'max_tokens',
  'Number of tokens of the text to use; all by default.',
  int,
  lower_bound=2,
)


def to_text(result: evaluation.Evaluation) -> str:
  """Formats the measured numbers, one a line."""
  lines = [f'perplexity   {result.perplexity:.4f} on {result.tokens:,} tokens']
  if result.kl is not None:
    lines.append(f'KL           {result.kl:.3g} from the reference')
  if result.ear is not None:
    lines.append(f'EAR          {result.ear:.2%} of tokens agree with the reference')
  if result.kl_rerounded is not None:
    lines.append(f'noise floor  {result.kl_rerounded:.3g} by rotation and rounding')
  return '\n'.join(lines)


def main() -> program.Result:
  text = program.read_text(_TEXT.value)
  # A base is for the file of the two that may need one.
  needs = _REFERENCE.value is not None and shards.is_encoded(_REFERENCE.value)
  own = None if needs and not shards.is_encoded(_MODEL.value) else _BASE.value
  checkpoint = program.read_model(_MODEL.value, own)
  tokens = program.read_tokens(checkpoint.files, checkpoint.model.config, text)
  reference = rerounded = None
  if _REFERENCE.value is not None:
    base = _BASE.value if needs else None
    reference = program.read_model(_REFERENCE.value, base).model
    rerounded = passes.randomly_rotated(reference, key=jax.random.key(0))
  result = evaluation.evaluate(
    checkpoint.model,
    tokens,
    reference=reference,
    rerounded=rerounded,
    max_tokens=_MAX_TOKENS.value,
    progress=True,
  )
  if not all(math.isfinite(number) for number in result if number is not None):
    raise ValueError(f'{_MODEL.value}: the predictions are not finite')
  return result._asdict(), to_text(result)
