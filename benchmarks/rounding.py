"""Measures which parameters can be rounded to a shared step, and at what cost.

  python -m benchmarks.rounding --checkpoint=DIR --text=FILE [--max_tokens=8192]
    [--results=RESULTS.md]

The transforms of `free` are applied once. In a row some parameters are
rounded to a step that is some octaves from the step of their dtype at the root mean
square of the array (see `passes.rounding`), and the others to the nearest number of
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

from benchmarks import sections
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax.cli import program
from rotbits_jax.presets import steps as steps_lib

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
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file of results to write the section to.', flag_values=FLAGS
)

_ABOUT = (
  'In each\nrow the named parameters are rounded to a shared step, after the '
  'transforms of `free`, and the others\nto the nearest number.'
)

ROWS = (
  ('none', '$^', 0),
  ('all', '', 0),
  ('all, an octave finer', '', -1),
  ('all, an octave coarser', '', 1),
  ('head', '^head/', 0),
  ('head, two octaves finer', '^head/', -2),
  ('embedding, or its map', '^embed/tokens', 0),
  ('embedding, octave coarser', '^embed/tokens', 1),
  ('factors B of shortcuts', 'shortcut', 0),
  ('factors B, octave coarser', 'shortcut', 1),
  ('attention', '/attention/', 0),
  ('MLP', '/mlp/', 0),
)
"""Name of a row, pattern of the paths that are rounded to a step, and octaves."""


def rounding(pattern: str, offset: float) -> passes.Rounding:
  def octaves(path: str, dtype: np.dtype) -> float | None:
    return offset - jnp.finfo(dtype).nmant if re.search(pattern, path) else None

  return passes.Rounding(octaves)


def main() -> None:
  checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
  model = checkpoint.model
  text = program.read_text(_TEXT.value)
  tokens = evaluation.encode_text(checkpoint.files, text)
  # `near` has the transforms of `free`.
  rewritten = steps_lib.rewritten(model)
  context = passes.make_context(model)._replace(source=rewritten)
  again = passes.randomly_rotated(model, key=jax.random.key(0))
  measure = lambda compared: evaluation.compare(
    {'it': compared}, tokens, {'model': model}, max_tokens=_MAX_TOKENS.value
  )['it']
  noise = measure(again).kl['model']
  lines: list[str] = []

  def show(name: str, saved: str, kl: float) -> None:
    lines.append(f'{name:26}{saved:>14}{kl:11.3g}{kl / noise:12.2f}')
    print(lines[-1], flush=True)

  lines.append(
    f'{"rounded to a step":26}{"bytes saved":>14}{"KL":>11}{"over noise":>12}'
  )
  print(lines[0])
  show('rotated, rounded again', '', noise)
  for name, pattern, offset in ROWS:
    units = [
      unit
      for some, _ in passes.rewrite(
        context, passes.chain(), rounding=rounding(pattern, offset)
      )
      for unit in some
    ]
    saved = sum(
      saving.bytes
      for unit in units
      for saving in unit.savings
      if saving.name == passes.ROUNDING
    )
    kl = measure(passes.to_model(model.config, units)).kl['model']
    show(name, f'{saved:,}', kl)
  if _RESULTS.value is not None:
    title = f'What a shared step costs: {pathlib.Path(_CHECKPOINT.value).name}'
    text = '\n'.join(lines)
    about = f'`python -m benchmarks.rounding`, {sections.machine()}. {_ABOUT}'
    sections.write(_RESULTS.value, title, sections.with_table(about, text))


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
