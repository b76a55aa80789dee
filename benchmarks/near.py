"""Bits a number against KL divergence and agreement: `near` beside other formats.

  pip install '.[text,benchmark]'
  python -m benchmarks.near --checkpoint=DIR [--text=FILE] [--max_tokens=N]
    [--calibration=FILE] [--calibration_tokens=N] [--picture=FILE.svg]
    [--results=RESULTS.md --name=NAME]

The same matrices are stored in different ways, and the same code measures each on the
same text. DIR is any checkpoint, sliced or dense:

  near              `near` at several steps, one step for all kinds of parameters
  near, feedback    the same steps, rounded with error feedback
  near, calibrated  with feedback, and the offsets of `steps.calibrate`, whose mean is 0
  GGUF              blocks of 32 or 256 numbers with scales of their own
  rows, zstd        integers with one scale for each output, compressed by zstd
  WaterSIC-style    a step for each input feature, with feedback, on the same text

Bytes are those of the whole file for `near`, but without a tokenizer. For the others
they are those of the numbers alone; `benchmarks.formats` says how these are made. The
last columns tell at which share of the bytes `near` has the same divergence, by linear
interpolation of the bytes in log KL.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
import math
import os
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from benchmarks import charts
from benchmarks import demo
from benchmarks import formats
from benchmarks import sections
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax.cli import program
from rotbits_jax.evaluation import perplexity
from rotbits_jax.presets import steps as steps_lib
from rotbits_jax.system import outputs

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  str(demo.WEIGHTS.parent),
  'A directory with a checkpoint and its tokenizer.',
  flag_values=FLAGS,
)
_TEXT = flags.DEFINE_string(
  'text', None, 'The text to evaluate on; part of the package.', flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 2048, 'Number of tokens of the text to use.', flag_values=FLAGS
)
_CALIBRATION = flags.DEFINE_string(
  'calibration',
  None,
  'The text to calibrate on; part of the package.',
  flag_values=FLAGS,
)
_CALIBRATION_TOKENS = flags.DEFINE_integer(
  'calibration_tokens', 4096, 'Number of its tokens to use.', flag_values=FLAGS
)
_STEPS = flags.DEFINE_list(
  'steps',
  ['-6', '-5', '-4', '-3', '-2', '-1', '0'],
  'Steps of near.',
  flag_values=FLAGS,
)
_PICTURE = flags.DEFINE_string(
  'picture', None, 'The SVG file to write.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file of results to write the section to.', flag_values=FLAGS
)
_NAME = flags.DEFINE_string(
  'name', None, 'What the section calls the model.', flag_values=FLAGS
)

BLOCKS = (
  *('Q8_0', 'Q6_K', 'Q5_1', 'Q5_K', 'Q5_0', 'Q4_1', 'Q4_K', 'Q4_0'),
  *('IQ4_NL', 'IQ4_XS', 'Q3_K'),
)
"""GGUF's formats, from the largest to the smallest."""

DRAWN = ('Q8_0', 'Q6_K', 'Q5_K', 'Q4_K', 'Q3_K', 'int8', 'int4')
"""The formats in the picture, where the names of all would cover each other."""

WIDTHS = (8, 6, 5, 4)
"""Bits of the integers of rows."""

PLAIN, FEEDBACK, CALIBRATED = 'near', 'near, feedback', 'near, calibrated'
GGUF, ROWS, WATERSIC = 'GGUF', 'rows, zstd', 'WaterSIC-style'

_TOGETHER = 3
"""How many models are in memory at once, so that the reference predicts less often."""


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    series: one of `PLAIN`, `FEEDBACK`, `CALIBRATED`, `GGUF`, `ROWS` and `WATERSIC`.
    name: the step or the format.
    bytes: the bytes that the model takes.
    perplexity: perplexity on the text.
    kl: mean KL divergence from the model's own predictions, in nats.
    ear: mean expected agreement rate with these predictions.
  """

  series: str
  name: str
  bytes: int
  perplexity: float
  kl: float
  ear: float


# ---- the models ----------------------------------------------------------------------


def stored_by_near(
  rewritten: models.Model,
  step: float,
  offsets: Mapping[str, float],
  inputs: Mapping[str, passes.Inputs],
) -> formats.Stored:
  """Encodes a model with the preset `near` and decodes it.

  Args:
    rewritten: the model after the transforms of `near`, which are the same for every
      step; see `steps_lib.rewritten`.
    step: see `presets.near`.
    offsets: see `presets.near`.
    inputs: see `presets.near`.
  """
  preset = presets.near(step=step, offsets=offsets, inputs=inputs)
  preset = preset._replace(transform=passes.chain())
  data = rotbits_jax.encode(rewritten, preset=preset)
  loaded = rotbits_jax.load(data)
  assert isinstance(loaded, rotbits_jax.Model)
  return formats.Stored(loaded, len(data))


def inputs_of(model: models.Model, tokens: np.ndarray) -> dict[str, passes.Inputs]:
  """Measures the inputs of a model's own matrices on a text."""
  found: dict[str, passes.Inputs] = {}
  windows = perplexity.full_windows(tokens, model.config)
  for name, factors in models.fisher_factors(model, windows):
    if name != 'embed':
      own = jax.device_get(factors.by_path())
      found |= {path: passes.Inputs(moments, 0) for path, moments in own.items()}
  if model.config.tied_head:
    found['embed/tokens'] = found.pop('head/kernel')
  return found


# ---- the measurements ----------------------------------------------------------------


def measure(
  model: models.Model,
  tokens: np.ndarray,
  found: steps_lib.Calibration,
  inputs: Mapping[str, passes.Inputs],
  steps: Sequence[float],
) -> list[Row]:
  """Measures each way to store a model.

  Args:
    model: the model.
    tokens: `[N]` tokens of the text to evaluate on.
    found: the calibration of the model on another text.
    inputs: the inputs of the model's own matrices on that text.
    steps: steps of `near`, from the finest to the coarsest.

  Returns:
    The rows of the table.
  """
  rewritten = steps_lib.rewritten(model)
  model = jax.device_put(model)
  plans: list[tuple[str, str, Callable[[], formats.Stored]]] = []
  ways = {
    PLAIN: ({}, {}),
    FEEDBACK: ({}, found.inputs),
    CALIBRATED: (found.offsets, found.inputs),
  }
  for name, (offsets, own_inputs) in ways.items():
    for step in steps:
      make = functools.partial(stored_by_near, rewritten, step, offsets, own_inputs)
      plans.append((name, f'2^{step:g}', make))
  for name in BLOCKS:
    plans.append((GGUF, name, functools.partial(formats.in_blocks, model, name)))
  for bits in WIDTHS:
    plans.append((ROWS, f'int{bits}', functools.partial(formats.in_rows, model, bits)))
  for step in steps:
    make = functools.partial(formats.like_watersic, model, step, inputs)
    plans.append((WATERSIC, f'2^{step:g}', make))
  rows = []
  for some in _batched(plans, _TOGETHER):
    stored = {(series, name): make() for series, name, make in some}
    measured = evaluation.compare(
      {' '.join(key): x.model for key, x in stored.items()},
      tokens,
      {'model': model},
      progress=True,
    )
    for key, x in stored.items():
      own = measured[' '.join(key)]
      measures = own.perplexity, own.kl['model'], own.ear['model']
      rows.append(Row(*key, x.bytes, *measures))
  return rows


def bytes_at(rows: Sequence[Row], series: str, kl: float) -> float | None:
  """Returns the bytes of a series at a divergence; None outside its range."""
  curve = sorted((row.kl, row.bytes) for row in rows if row.series == series)
  for (low, more), (high, less) in itertools.pairwise(curve):
    if low <= kl <= high:
      share = math.log(kl / low) / math.log(high / low)
      return more + share * (less - more)
  return None


def to_text(rows: Sequence[Row], elements: int) -> str:
  """Formats the table. Bits are those of the bytes for each element of the model."""
  lines = [
    f'{"":18}{"":6}{"bytes":>13}{"bits":>8}{"perplexity":>12}{"KL":>10}{"EAR":>9}'
    f'{"near there":>12}{"calibrated":>12}'
  ]
  shown = None
  for row in rows:
    ours = ''
    if row.series in (GGUF, ROWS, WATERSIC):
      for series in (PLAIN, CALIBRATED):
        size = bytes_at(rows, series, row.kl)
        ours += f'{"" if size is None else f"{size / row.bytes:.3f}":>12}'
    lines.append(
      f'{row.series if row.series != shown else "":18}{row.name:6}{row.bytes:13,}'
      f'{8 * row.bytes / elements:8.3f}{row.perplexity:12.3f}{row.kl:10.2e}'
      f'{row.ear:9.2%}{ours.rstrip()}'
    )
    shown = row.series
  return '\n'.join(lines)


def picture(rows: Sequence[Row], elements: int) -> str:
  """Draws bits a number against divergence, as an SVG file."""
  series = []
  for name, own in itertools.groupby(rows, lambda row: row.series):
    if name == FEEDBACK:  # it is close to the series beside it
      continue
    is_format = name in (GGUF, ROWS)
    points = [row for row in own if row.name in DRAWN or not is_format]
    series.append(
      charts.Series(
        name,
        [8 * row.bytes / elements for row in points],
        [row.kl for row in points],
        line=not is_format,  # formats are no steps of one thing
        labels=[row.name for row in points] if is_format else None,
      )
    )
  low = 10.0 ** math.floor(math.log10(min(row.kl for row in rows)))
  high = 10.0 ** math.ceil(math.log10(max(row.kl for row in rows)))
  right = math.ceil(max(x for own in series for x in own.x))
  drawn = charts.chart(
    series,
    charts.Axis('bits a number', 0, right),
    charts.Axis('KL divergence, nats a token', low, high, log=True),
    title='Bits a number against KL divergence of near and of other formats',
    inside=True,
  )
  return charts.standalone(drawn) + '\n'


def _batched(items: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
  for start in range(0, len(items), count):
    yield items[start : start + count]


def main() -> None:
  if _PICTURE.value:
    outputs.check(outputs.resolved(_PICTURE.value), overwrite=True)
  checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
  tokens, calibration = (
    evaluation.encode_text(
      checkpoint.files,
      demo.read_data(f'{name}.txt') if path is None else program.read_text(path),
    )[:count]
    for name, path, count in (
      ('evaluation', _TEXT.value, _MAX_TOKENS.value),
      ('calibration', _CALIBRATION.value, _CALIBRATION_TOKENS.value),
    )
  )
  found = steps_lib.calibrate(checkpoint.model, calibration, progress=True)
  steps = [float(step) for step in _STEPS.value]
  inputs = inputs_of(checkpoint.model, calibration)
  rows = measure(checkpoint.model, tokens, found, inputs, steps)
  elements = passes.count_model(checkpoint.model)[0]
  lines = [to_text(rows, elements), '', f'{"offset":>8}{"KL at 2^-5":>12}']
  kinds: dict[str, list[str]] = {}
  for path in sorted(found.offsets, key=found.offsets.__getitem__):
    kinds.setdefault(models.names.pattern(path), []).append(path)
  for kind, paths in kinds.items():
    offset = sum(found.offsets[x] for x in paths) / len(paths)
    kl = sum(found.sensitivities[x] for x in paths)
    lines.append(f'{offset:8.2f}{kl:12.2e}  {kind}')
  text = '\n'.join(lines)
  print(text)
  if _PICTURE.value:
    pathlib.Path(_PICTURE.value).write_text(picture(rows, elements))
  if _RESULTS.value:
    name = _NAME.value or pathlib.Path(_CHECKPOINT.value).name
    about = (
      f'`python -m benchmarks.near`, {sections.machine()}.\nPerplexity, KL and EAR on '
      f'{len(tokens):,} tokens; offsets calibrated on {len(calibration):,} others.'
    )
    body = sections.with_table(about, text)
    if _PICTURE.value:
      link = os.path.relpath(_PICTURE.value, pathlib.Path(_RESULTS.value).parent)
      body += f'\n\n![Bits a number against KL divergence on {name}]({link})'
    sections.write(_RESULTS.value, f'`near` beside other formats: {name}', body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
