"""Bytes against KL divergence: the preset `near` beside block formats and int8.

  pip install '.[text,benchmark]'
  python -m benchmarks.near --checkpoint=DIR [--text=FILE] [--max_tokens=N]
    [--calibration=FILE] [--calibration_tokens=N] [--picture=FILE.svg]
    [--results=RESULTS.md --name=NAME]

The same matrices are stored in different ways, and the same code measures each on the
same text:

  near              `near` at several steps, one step for all kinds of parameters
  near, feedback    the same steps, rounded with error feedback
  near, calibrated  with feedback, and the offsets of `steps.calibrate`, whose mean is 0
  GGUF              blocks of 32 numbers, quantised by the package `gguf`
  int8              one scale for each output, quantised by the package `qwix`

Bytes are those of the whole file for `near`, but without a tokenizer. For the others
they are those of the numbers alone. The last columns tell at which share of the bytes
`near` has the same divergence, by linear interpolation of the bytes in log KL.
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
import gguf
import jax
import numpy as np

from benchmarks import demo
from benchmarks import int8
from benchmarks import sections
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.cli import program
from rotbits_jax.presets import steps as steps_lib
from rotbits_jax.report import charts
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
  'calibration_tokens', 2048, 'Number of its tokens to use.', flag_values=FLAGS
)
_STEPS = flags.DEFINE_list(
  'steps', ['-7', '-6', '-5', '-4', '-3', '-2'], 'Steps of near.', flag_values=FLAGS
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

BLOCKS = ('Q8_0', 'Q5_1', 'Q5_0', 'Q4_1', 'Q4_0')
"""GGUF's formats, from the largest to the smallest."""

PLAIN, FEEDBACK, CALIBRATED = 'near', 'near, feedback', 'near, calibrated'
GGUF, INT8 = 'GGUF', 'int8, Qwix'

_TOGETHER = 3
"""How many models are in memory at once, so that the reference predicts less often."""


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    series: one of `PLAIN`, `FEEDBACK`, `CALIBRATED`, `GGUF` and `INT8`.
    name: the step or the format.
    bytes: the bytes that the model takes.
    perplexity: perplexity on the text.
    kl: mean KL divergence from the model's own predictions, in nats.
  """

  series: str
  name: str
  bytes: int
  perplexity: float
  kl: float


class Stored(NamedTuple):
  """A model whose numbers were rounded, and the bytes that it takes."""

  model: models.Model
  bytes: int


# ---- the models ----------------------------------------------------------------------


def stored_by_near(
  rewritten: models.Model,
  step: float,
  offsets: Mapping[str, float],
  inputs: Mapping[str, passes.Inputs],
) -> Stored:
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
  return Stored(loaded, len(data))


def stored_in_blocks(model: models.Model, name: str) -> Stored:
  """Quantises the matrices of a model to a block format of GGUF, and dequantises them.

  A block has 32 numbers that meet the inputs of one output, as in llama.cpp's files. If
  the number of inputs is not a multiple of 32, blocks run on into the next output.
  """
  kind = gguf.GGMLQuantizationType[name]
  length, size = gguf.GGML_QUANT_SIZES[kind]

  def rounded(rows: np.ndarray) -> tuple[np.ndarray, int]:
    flat = np.pad(rows.reshape(-1), (0, -rows.size % length)).reshape(-1, length)
    numbers = gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)
    return numbers.reshape(-1)[: rows.size].reshape(rows.shape), len(flat) * size

  return _stored(model, rounded)


def stored_as_int8(model: models.Model) -> Stored:
  """Quantises the matrices of a model to int8 with Qwix, and dequantises them."""

  def rounded(rows: np.ndarray) -> tuple[np.ndarray, int]:
    leaf = int8.quantize(rows.T, np.float16)
    size = structured.count_bytes(leaf)
    # The products of values and scales are not rounded to the dtype of the scales.
    leaf = int8.Int8(leaf.values, leaf.scales.astype(np.float32))
    return np.asarray(leaf.materialize()).T, size

  return _stored(model, rounded)


def _stored(
  model: models.Model, rounded: Callable[[np.ndarray], tuple[np.ndarray, int]]
) -> Stored:
  """Rounds the matrices of a model; vectors keep their dtype.

  Args:
    model: the model.
    rounded: takes float32 rows, one for each output or each token. Returns the rounded
      rows and their bytes.
  """
  total = 0

  def round_tree(tree: models.Params) -> models.Params:
    nonlocal total
    flat = structured.flatten(tree)
    for path, leaf in flat.items():
      array = np.asarray(leaf)
      if array.ndim < 2:
        total += array.nbytes
        continue
      # A kernel `[inputs, outputs]` has a row for each input.
      turn = np.transpose if path.endswith('/kernel') else np.asarray
      rows, size = rounded(np.ascontiguousarray(turn(array), np.float32))
      flat[path] = np.ascontiguousarray(turn(rows))
      total += size
    return structured.unflatten(flat)

  layers = [round_tree(layer) for layer in model.layers()]
  outer = round_tree(model.outer())
  return Stored(models.from_layers(model.config, outer, layers), total)


# ---- the measurements ----------------------------------------------------------------


def measure(
  model: models.Model,
  tokens: np.ndarray,
  found: steps_lib.Calibration,
  steps: Sequence[float],
) -> list[Row]:
  """Measures each way to store a model.

  Args:
    model: the model.
    tokens: `[N]` tokens of the text to evaluate on.
    found: the calibration of the model on another text.
    steps: steps of `near`, from the finest to the coarsest.

  Returns:
    The rows of the table.
  """
  rewritten = steps_lib.rewritten(model)
  model = jax.device_put(model)
  plans: list[tuple[str, str, Callable[[], Stored]]] = []
  ways = {
    PLAIN: ({}, {}),
    FEEDBACK: ({}, found.inputs),
    CALIBRATED: (found.offsets, found.inputs),
  }
  for name, (offsets, inputs) in ways.items():
    for step in steps:
      make = functools.partial(stored_by_near, rewritten, step, offsets, inputs)
      plans.append((name, f'2^{step:g}', make))
  for name in BLOCKS:
    plans.append((GGUF, name, functools.partial(stored_in_blocks, model, name)))
  plans.append((INT8, '', functools.partial(stored_as_int8, model)))
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
      rows.append(Row(*key, x.bytes, own.perplexity, own.kl['model']))
  return rows


def bytes_at(rows: Sequence[Row], series: str, kl: float) -> float | None:
  """Returns the bytes of a series at a divergence; None outside its range."""
  curve = sorted((row.kl, row.bytes) for row in rows if row.series == series)
  for (low, more), (high, less) in itertools.pairwise(curve):
    if low <= kl <= high:
      share = math.log(kl / low) / math.log(high / low)
      return more + share * (less - more)
  return None


def to_text(rows: Sequence[Row], tensor_bytes: int) -> str:
  """Formats the table. Percentages are relative to the bytes of the tensors."""
  lines = [
    f'{"":18}{"":6}{"bytes":>13}{"":>8}{"perplexity":>12}{"KL":>10}'
    f'{"near there":>12}{"calibrated":>12}'
  ]
  shown = None
  for row in rows:
    ours = ''
    if row.series in (GGUF, INT8):
      for series in (PLAIN, CALIBRATED):
        size = bytes_at(rows, series, row.kl)
        ours += f'{"" if size is None else f"{size / row.bytes:.3f}":>12}'
    lines.append(
      f'{row.series if row.series != shown else "":18}{row.name:6}{row.bytes:13,}'
      f'{row.bytes / tensor_bytes:8.1%}{row.perplexity:12.3f}{row.kl:10.2e}'
      f'{ours.rstrip()}'
    )
    shown = row.series
  return '\n'.join(lines)


def picture(rows: Sequence[Row], tensor_bytes: int) -> str:
  """Draws bytes against divergence, as an SVG file."""
  series = []
  for name, own in itertools.groupby(rows, lambda row: row.series):
    points = list(own)
    series.append(
      charts.Series(
        name,
        [100 * row.bytes / tensor_bytes for row in points],
        [row.kl for row in points],
        line=name not in (GGUF, INT8),  # formats are no steps of one thing
        labels=[row.name for row in points] if name == GGUF else None,
      )
    )
  low = 10.0 ** math.floor(math.log10(min(row.kl for row in rows)))
  high = 10.0 ** math.ceil(math.log10(max(row.kl for row in rows)))
  right = 10 * math.ceil(max(x for own in series for x in own.x) / 10)
  drawn = charts.chart(
    series,
    charts.Axis('bytes, % of the tensors', 10, right),
    charts.Axis('KL divergence, nats a token', low, high, log=True),
    title='Bytes against KL divergence of near, GGUF block formats and int8',
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
  rows = measure(checkpoint.model, tokens, found, steps)
  tensor_bytes = passes.count_model(checkpoint.model)[1]
  lines = [to_text(rows, tensor_bytes), '', f'{"offset":>8}{"KL at 2^-5":>12}']
  for kind, offset in sorted(found.offsets.items(), key=lambda item: item[1]):
    lines.append(f'{offset:8.2f}{found.sensitivities[kind]:12.2e}  {kind}')
  text = '\n'.join(lines)
  print(text)
  if _PICTURE.value:
    pathlib.Path(_PICTURE.value).write_text(picture(rows, tensor_bytes))
  if _RESULTS.value:
    name = _NAME.value or pathlib.Path(_CHECKPOINT.value).name
    about = (
      f'`python -m benchmarks.near`, {sections.machine()}.\nPerplexity and KL on '
      f'{len(tokens):,} tokens; offsets calibrated on {len(calibration):,} others.'
    )
    body = sections.with_table(about, text)
    if _PICTURE.value:
      link = os.path.relpath(_PICTURE.value, pathlib.Path(_RESULTS.value).parent)
      body += f'\n\n![Bytes against KL divergence on {name}]({link})'
    sections.write(_RESULTS.value, f'`near` beside other formats: {name}', body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
