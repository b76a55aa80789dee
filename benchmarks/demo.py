"""Encodes, decodes and evaluates a small trained model, and prints one table.

  bash demo.sh [--quick] [--output=DIR]

The model is the OPT of four layers in tests/testdata, sliced by Microsoft's SliceGPT;
the text is the excerpt of the Jargon File that ships with the package. Seconds include
what JAX takes to compile.
"""

from collections.abc import Iterator
import importlib.resources
import pathlib
import sys
import time
from typing import NamedTuple

from absl import flags
import jax

import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import symmetries
from rotbits_jax.cli import program

ROOT = pathlib.Path(__file__).parents[1]
WEIGHTS = ROOT / 'tests' / 'testdata' / 'opt-small-sliced-0.2' / 'opt-small_0.2.pt'
QUICK_TOKENS = 8192

FLAGS = flags.FlagValues()
_QUICK = flags.DEFINE_bool(
  'quick', False, f'Evaluate on {QUICK_TOKENS} tokens only.', flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
  'output', 'demo_output', 'The directory for the encoded files.', flag_values=FLAGS
)


class Row(NamedTuple):
  """One line of the table; None where there is nothing to measure."""

  name: str
  bytes: int
  perplexity: float | None = None
  kl: float | None = None
  kl_floor: float | None = None
  encode_seconds: float | None = None
  decode_seconds: float | None = None


def measure(
  weights: pathlib.Path,
  text: str,
  output: pathlib.Path,
  *,
  max_tokens: int | None = None,
) -> Iterator[Row]:
  """Measures the checkpoint itself and then each preset.

  Args:
    weights: a sliced checkpoint's weights file.
    text: what to evaluate on.
    output: the directory to write `<preset>.rotbits` to.
    max_tokens: tokens of the text to use; None for all.

  Yields:
    The rows of the table.
  """
  checkpoint = rotbits_jax.load_checkpoint(weights)
  model, tokens = checkpoint.model, evaluation.encode_text(checkpoint.files, text)
  rerounded = symmetries.randomly_rotated(model, key=jax.random.key(0))
  before = evaluation.evaluate(
    model,
    tokens,
    reference=model,
    rerounded=rerounded,
    max_tokens=max_tokens,
    progress=True,
  )
  yield Row(f"SliceGPT's {weights.suffix}", weights.stat().st_size)
  _, raw_bytes = symmetries.count(model)
  yield Row('raw tensors', raw_bytes, before.perplexity)
  for preset in rotbits_jax.PRESETS:
    path = output / f'{preset}.rotbits'
    start = time.perf_counter()
    data = rotbits_jax.encode(
      model, preset=preset, files=checkpoint.files, stem=checkpoint.stem, progress=True
    )
    rotbits_jax.write_file(path, data)
    encoded = time.perf_counter()
    decoded = jax.block_until_ready(rotbits_jax.load(path, progress=True))
    stop = time.perf_counter()
    after = evaluation.evaluate(
      decoded, tokens, reference=model, max_tokens=max_tokens, progress=True
    )
    yield Row(
      preset,
      len(data),
      after.perplexity,
      after.kl,
      before.kl_rerounded,
      encoded - start,
      stop - encoded,
    )


def to_text(rows: list[Row]) -> str:
  """The table; reductions are of the raw tensors' bytes."""
  raw_bytes = next(row.bytes for row in rows if row.name == 'raw tensors')
  cells = [
    ('', 'bytes', 'reduction', 'perplexity', 'KL', 'KL floor', 'encode s', 'decode s')
  ]
  cells += [
    (
      row.name,
      f'{row.bytes:,}',
      f'{100 * (1 - row.bytes / raw_bytes):.2f}%',
      _cell(row.perplexity, '.3f'),
      _cell(row.kl, '.2g'),
      _cell(row.kl_floor, '.2g'),
      _cell(row.encode_seconds, '.1f'),
      _cell(row.decode_seconds, '.1f'),
    )
    for row in rows
  ]
  widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
  return '\n'.join(
    '  '.join(
      [line[0].ljust(widths[0])]
      + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    ).rstrip()
    for line in cells
  )


def _cell(value: float | None, form: str) -> str:
  return '' if value is None else format(value, form)


def main() -> None:
  data = importlib.resources.files('rotbits_jax') / 'data'
  text = (data / 'evaluation.txt').read_text('utf-8')
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(exist_ok=True)
  tokens = QUICK_TOKENS if _QUICK.value else None
  print(to_text(list(measure(WEIGHTS, text, output, max_tokens=tokens))))
  print(
    '\nKL floor: the KL divergence of the same model, rotated at random and rounded to '
    f'its dtype\nagain. The files are in {output}; see one by\n'
    f'  .venv/bin/rotbits inspect --input={output / "free.rotbits"}'
  )


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
