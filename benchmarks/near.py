"""Compares `near` with other lossy formats: bytes, perplexity, KL and agreement.

The same code measures all ways to store the same matrices, on the same text:

  near              one step for all matrices, rounded with error feedback
  near, calibrated  a step for each matrix, row and column, by the Fisher information
  GGUF              blocks of 32 or 256 weights with scales
  rows, zstd        integers with one scale for each output, compressed by zstd

For `near`, bytes are those of the whole file, without a tokenizer; for other formats,
of codes and scales alone. `benchmarks.formats` says how these are made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
import math
from typing import NamedTuple

import jax

from benchmarks import common
from benchmarks import formats
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.presets import steps as steps_lib

TOKENS, CALIBRATION_TOKENS = 1024, 2048
STEPS = (-5, -3, -1)
BLOCKS = ('Q8_0', 'Q5_K', 'Q4_K')
WIDTHS = (8, 4)
PLAIN, CALIBRATED, GGUF, ROWS = 'near', 'near, calibrated', 'GGUF', 'rows, zstd'
PICTURES = {
  'opt-small, sliced by 20%': 'near-opt-small.svg',
  'SmolLM2-135M, once Q4_1': 'near-smollm2.svg',
}
"""The models, and the pictures of their tables."""


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    method: one of `PLAIN`, `CALIBRATED`, `GGUF` and `ROWS`.
    format: the step or the format.
    bytes: the bytes that the model takes.
    perplexity: perplexity on the text.
    kl: mean KL divergence from the model's own predictions, in nats.
    agreement: mean expected agreement rate with these predictions.
  """

  method: str
  format: str
  bytes: int
  perplexity: float
  kl: float
  agreement: float


def title(model: str) -> str:
  """Returns the title of a section."""
  return f'`near` and other formats: {model}'


def stored_by_near(
  model: models.Model,
  step: float,
  offsets: Mapping[str, float],
  inputs: Mapping[str, passes.Inputs],
) -> formats.Stored:
  """Encodes with `near` and decodes; see `presets.near` for the arguments."""
  preset = presets.near(step=step, offsets=offsets, inputs=inputs)
  data = rotbits_jax.encode(model, preset=preset)
  loaded = rotbits_jax.load(data)
  assert isinstance(loaded, rotbits_jax.Model)
  return formats.Stored(loaded, len(data))


def measure(checkpoint: rotbits_jax.Checkpoint) -> list[Row]:
  """Measures each way to store a model."""
  model = checkpoint.model
  read = lambda name: evaluation.encode_text(checkpoint.files, common.read_data(name))
  tokens = read('evaluation.txt')[:TOKENS]
  calibration = read('calibration.txt')[:CALIBRATION_TOKENS]
  calibrated = steps_lib.calibrate(model, calibration, progress=True)
  model = jax.device_put(model)
  ways: list[tuple[str, str, Callable[[], formats.Stored]]] = []
  for method, offsets in ((PLAIN, {}), (CALIBRATED, calibrated.offsets)):
    for step in STEPS:
      settings = step, offsets, calibrated.inputs
      make = functools.partial(stored_by_near, model, *settings)
      ways.append((method, f'2^{step}', make))
  ways += [(GGUF, x, functools.partial(formats.in_blocks, model, x)) for x in BLOCKS]
  ways += [
    (ROWS, f'int{x}', functools.partial(formats.in_rows, model, x)) for x in WIDTHS
  ]
  rows = []
  for method, name, store in ways:
    stored = store()
    measured = evaluation.evaluate(stored.model, tokens, reference=model, progress=True)
    assert measured.kl is not None
    assert measured.ear is not None
    measures = measured.perplexity, measured.kl, measured.ear
    rows.append(Row(method, name, stored.bytes, *measures))
  return rows


def share_of_near(rows: Sequence[Row], other: Row) -> str | None:
  """Returns the share of the bytes at which calibrated `near` has the same KL.

  Bytes are interpolated linearly in log KL. Where the coarsest step has a lower KL, its
  bytes are a bound; where the finest has a higher one, the share is None.
  """
  curve = sorted((row.kl, row.bytes) for row in rows if row.method == CALIBRATED)
  for (low, more), (high, less) in itertools.pairwise(curve):
    if low <= other.kl <= high:
      part = math.log(other.kl / low) / math.log(high / low)
      return f'{(more + part * (less - more)) / other.bytes:.3f}'
  highest, least = curve[-1]
  return f'< {least / other.bytes:.3f}' if other.kl > highest else None


def to_table(rows: Sequence[Row], elements: int) -> str:
  """Formats the rows, with bits per weight of the model."""
  lines = []
  for row in rows:
    share = None if 'near' in row.method else share_of_near(rows, row)
    lines.append(
      (
        *(row.method, row.format, common.megabytes(row.bytes)),
        f'{8 * row.bytes / elements:.3f}',
        *(f'{row.perplexity:.3f}', f'{row.kl:.2e}', f'{row.agreement:.2%}'),
        share,
      )
    )
  header = ['method', 'format', 'MB', 'bits', 'perplexity', 'KL', 'agreement']
  return common.table([*header, '`near` takes'], lines, texts=2)


def run(settings: common.Settings) -> Iterator[common.Section]:
  folders = [common.SLICED]
  if not settings.quick:
    folders.append(common.smollm2(settings))
  for name, folder in zip(PICTURES, folders, strict=False):
    checkpoint = rotbits_jax.load_checkpoint(folder)
    rows = measure(checkpoint)
    elements = structured.count_elements(dict(checkpoint.model.leaves()))
    about = (
      f'Perplexity, KL in nats per token and agreement on {TOKENS:,} tokens; steps are '
      f'calibrated on {CALIBRATION_TOKENS:,} others. Bits are per weight. The last '
      'column is the size of calibrated `near` at the same KL, relative to the row; '
      'with <, even the coarsest step has a lower KL.'
    )
    picture = f'![Bits per weight against KL](docs/pictures/{PICTURES[name]})'
    body = f'{about}\n\n{to_table(rows, elements)}\n\n{picture}'
    yield common.Section(title(name), body)
