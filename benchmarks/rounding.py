"""Measures which parameters can be rounded to a shared step, and at what cost.

  python -m benchmarks.rounding --checkpoint=DIR --text=FILE [--max_tokens=8192]

The transforms of `free` are applied once for each row. In a row some parameters are
rounded to a step that is some octaves from the step of their dtype at the root mean
square of the array (see `symmetries.rounding`), and the others to the nearest number of
their dtype. The columns are: the bytes that the step saves, estimated as in the report
of a file; the mean KL divergence from the checkpoint's predictions in nats; and that
divergence over the divergence of a random rotation that is rounded again.
"""

import pathlib
import re
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import presets
from rotbits_jax import symmetries
from rotbits_jax.cli import program
from rotbits_jax.symmetries import transform

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A sliced checkpoint.', required=True, flag_values=FLAGS
)
_TEXT = flags.DEFINE_string(
  'text', None, 'A text file.', required=True, flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 8192, 'Tokens of the text to use.', flag_values=FLAGS
)

ROWS = (
  ('none', '$^', 0),
  ('all', '', 0),
  ('all, an octave finer', '', -1),
  ('all, an octave coarser', '', 1),
  ('head', '^head/', 0),
  ('head, two octaves finer', '^head/', -2),
  ('embedding', '^embed/', 0),
  ('shortcuts', 'shortcut', 0),
  ('attention', '/attention/', 0),
  ('MLP', '/mlp/', 0),
)
"""Name of a row, pattern of the paths that are rounded to a step, and octaves."""


def rounding(pattern: str, offset: float) -> symmetries.Rounding:
  def octaves(path: str, dtype: np.dtype) -> float | None:
    return offset - jnp.finfo(dtype).nmant if re.search(pattern, path) else None

  return symmetries.Rounding(octaves)


def main() -> None:
  checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
  model = checkpoint.model
  text = pathlib.Path(_TEXT.value).read_text(encoding='utf-8')
  tokens = np.array(evaluation.read_tokenizer(checkpoint.files).encode(text).ids)
  context = symmetries.make_context(model)
  again = symmetries.randomly_rotated(model, key=jax.random.key(0))
  measure = lambda compared: evaluation.compare(
    {'it': compared}, tokens, {'model': model}, max_tokens=_MAX_TOKENS.value
  )['it']
  noise = measure(again).kl['model']
  print(f'{"rounded to a step":26}{"bytes saved":>14}{"KL":>11}{"over noise":>12}')
  print(f'{"rotated, rounded again":26}{"":14}{noise:11.3g}{1:12.2f}', flush=True)
  for name, pattern, offset in ROWS:
    units = [
      unit
      for some, _ in symmetries.rewrite(
        context, presets.free().transform, rounding=rounding(pattern, offset)
      )
      for unit in some
    ]
    saved = sum(
      saving.bytes
      for unit in units
      for saving in unit.savings
      if saving.name == transform.ROUNDING
    )
    kl = measure(transform.to_model(model.config, units)).kl['model']
    print(f'{name:26}{saved:14,}{kl:11.3g}{kl / noise:12.2f}', flush=True)


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
