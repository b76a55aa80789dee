"""Measures the perplexity of a model on a text, and its divergence from a reference.

  rotbits evaluate --model=DIR|FILE --text=FILE [--reference=DIR|FILE]
    [--max_tokens=N] [--json]

A model is the directory or the weights file of a checkpoint, or a file that
`rotbits encode` wrote. The reference is another model, for example the model before it
was encoded. With a reference, two more numbers are measured: the mean KL divergence of
the predictions from the reference's predictions, and its noise floor. The noise floor
is the divergence that rounding alone makes: the reference is rotated at random, which
does not change its function, and rounded to its dtype again.
"""

import math
import sys

from absl import flags
import jax

from rotbits_jax import evaluation
from rotbits_jax import symmetries
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
_JSON = flags.DEFINE_bool(
  'json', False, 'Print one JSON object in place of lines.', flag_values=FLAGS
)


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
    rerounded = symmetries.randomly_rotated(reference, key=jax.random.key(0))
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
