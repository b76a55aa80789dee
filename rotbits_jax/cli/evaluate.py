"""Measures the perplexity of a model on a text, and its divergence from a reference.

  rotbits evaluate --model=DIR|FILE --text=FILE [--reference=DIR|FILE]
    [--max_tokens=N] [--json] [--verbose]

Example:

  rotbits evaluate --model=smollm2.rotbits --text=book.txt --reference=SmolLM2-135M

A model is a checkpoint's directory, its weights file, or a file that `rotbits encode`
wrote. With a reference, the mean KL divergence from its predictions is measured too,
and beside it the noise floor: the divergence that appears when the reference is merely
rotated at random and rounded to its dtype again. The model needs a tokenizer.json.

JSON:

  perplexity    exp of the mean cross entropy in nats
  tokens        count of the tokens that were predicted
  kl            mean KL divergence from the reference in nats, or null
  kl_rerounded  the noise floor in nats, or null
"""

import math
import sys

from absl import flags
import jax

from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  'model', None, 'The model to measure.', required=True, flag_values=FLAGS
)
_TEXT = flags.DEFINE_string(
  'text', None, 'A text file in UTF-8.', required=True, flag_values=FLAGS
)
_REFERENCE = flags.DEFINE_string(
  'reference', None, 'The model to compare predictions with.', flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens',
  None,
  'Number of tokens of the text to use; all by default.',
  lower_bound=2,
  flag_values=FLAGS,
)
_JSON, _VERBOSE = program.define_output_flags(FLAGS)


def to_text(result: evaluation.Evaluation) -> str:
  """Formats the measured numbers, one a line."""
  lines = [f'perplexity   {result.perplexity:.4f} on {result.tokens:,} tokens']
  if result.kl is not None:
    lines.append(f'KL           {result.kl:.3g} from the reference')
  if result.kl_rerounded is not None:
    lines.append(f'noise floor  {result.kl_rerounded:.3g} by rotation and rounding')
  return '\n'.join(lines)


def main() -> None:
  text = program.read_text(_TEXT.value)
  checkpoint = program.read_model(_MODEL.value)
  reference = rerounded = None
  if _REFERENCE.value is not None:
    reference = program.read_model(_REFERENCE.value).model
    rerounded = passes.randomly_rotated(reference, key=jax.random.key(0))
  result = evaluation.evaluate(
    checkpoint.model,
    evaluation.encode_text(checkpoint.files, text),
    reference=reference,
    rerounded=rerounded,
    max_tokens=_MAX_TOKENS.value,
    progress=True,
  )
  if not all(math.isfinite(number) for number in result if number is not None):
    raise ValueError(f'{_MODEL.value}: the predictions are not finite')
  if _JSON.value:
    program.print_json(result._asdict())
  else:
    print(to_text(result))


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
