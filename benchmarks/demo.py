"""Presets on a sliced model, and with SmolLM2 on a dense one: bytes, perplexity, KL.

  bash demo.sh            a small OPT of tests/testdata, sliced by Microsoft's SliceGPT
  bash demo.sh --full     SmolLM2-135M, too, dense and sliced: minutes

Each model is encoded with each preset, decoded, verified against what was given, and
evaluated on an excerpt of the Jargon File. KL is the divergence of the predictions from
those of the given model, in nats per token. Its floor is that of the same model
rotated at random and rounded again. Seconds include what JAX takes to compile.
"""

from collections.abc import Iterable, Iterator
import pathlib
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
import numpy as np

from benchmarks import common
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax import slicing
from rotbits_jax import structured

TITLE = 'How small is a model, and is it still the same?'
SPARSITY = 0.25
TOKENS = 1024
CALIBRATION_SEQUENCES, CALIBRATION_LENGTH = 8, 512

_FULL = flags.DEFINE_bool('full', False, 'Measures SmolLM2-135M, too.')


class Row(NamedTuple):
  """A line of a table; a field is None if it cannot be measured."""

  stored: str  # the preset, or another way to store it
  bytes: int | None = None  # of the file, or of the tensors
  share: float | None = None  # of the bytes of the tensors
  perplexity: float | None = None
  kl: float | None = None  # from the predictions of the model that was given
  encode_seconds: float | None = None  # from the folder to the file
  decode_seconds: float | None = None  # from the file to arrays
  verified: str = ''  # what `rotbits_jax.verify` compared


def sliced_smollm2(settings: common.Settings, sparsity: float) -> pathlib.Path:
  """Returns the folder of SmolLM2-135M, sliced as SliceGPT does, in float16."""
  dense_folder = common.smollm2(settings)
  stem = f'{dense_folder.name}_{sparsity}'
  folder = settings.output / stem
  if not folder.exists():
    dense = rotbits_jax.load_checkpoint(dense_folder)
    text = evaluation.encode_text(dense.files, common.read_data('calibration.txt'))
    sequences = slicing.sample_sequences(
      text, sequences=CALIBRATION_SEQUENCES, length=CALIBRATION_LENGTH, seed=42
    )
    sliced = slicing.slice_model(
      dense.model, sequences, sparsity=sparsity, progress=True
    )
    model = structured.astype(sliced, np.float16)
    checkpoint = slicing.sliced_checkpoint(dense, model, stem)
    rotbits_jax.save_checkpoint(checkpoint, folder, format='slicegpt')
  return folder


def measure(
  folder: pathlib.Path, presets: Iterable[Any], output: pathlib.Path
) -> Iterator[Row]:
  """Encodes a model with some presets, decodes, verifies and evaluates it."""
  checkpoint = rotbits_jax.load_checkpoint(folder)
  model = checkpoint.model
  tensors = structured.count_bytes(dict(model.leaves()))
  compared = {'tensors': model}
  stored = {'tensors': Row('tensors', tensors, 1.0)}
  for preset in presets:
    file = output / f'{folder.name}-{preset}.rotbits'
    start = time.perf_counter()
    rotbits_jax.encode_to_file(
      folder, file, preset=preset, overwrite=True, progress=True
    )
    encoded = time.perf_counter()
    compared[preset] = common.load_model(file)
    decoded = time.perf_counter()
    checked = rotbits_jax.verify(file, against=folder, progress=True)
    stored[preset] = Row(
      *(f'`{preset}`', file.stat().st_size, file.stat().st_size / tensors),
      encode_seconds=encoded - start,
      decode_seconds=decoded - encoded,
      verified='every bit' if checked.same_bits else 'function',
    )
  rerounded = 'rotated, rounded again'
  compared[rerounded] = passes.randomly_rotated(model, key=jax.random.key(0))
  stored[rerounded] = Row(rerounded)
  text = evaluation.encode_text(checkpoint.files, common.read_data('evaluation.txt'))
  measured: dict[str, evaluation.Evaluation] = {}
  for key, row in stored.items():
    same = 'tensors' if row.verified == 'every bit' else key
    if same not in measured:
      measured[same] = evaluation.evaluate(
        compared[same], text, reference=model, max_tokens=TOKENS, progress=True
      )
    measures = measured[same]
    yield row._replace(perplexity=measures.perplexity, kl=measures.kl)


def to_table(model: str, rows: Iterable[Row]) -> str:
  """Formats the rows of a model, whose name is the first of the header."""
  cell = lambda value, form: None if value is None else format(value, form)
  sizes = 'MB', 'share', 'perplexity', 'KL'
  return common.table(
    [model, *sizes, 'encode s', 'decode s', 'verified'],
    [
      (
        *(row.stored, row.bytes and common.megabytes(row.bytes)),
        cell(row.share, '.1%'),
        *(cell(row.perplexity, '.3f'), cell(row.kl, '.2g')),
        *(cell(row.encode_seconds, '.1f'), cell(row.decode_seconds, '.1f')),
        row.verified,
      )
      for row in rows
    ],
  )


def run(settings: common.Settings, full: bool = True) -> Iterator[common.Section]:
  settings.output.mkdir(parents=True, exist_ok=True)
  presets: tuple[str, ...] = ('exact', 'free', 'near')
  subjects = {'opt-small, sliced by 20%': (common.SLICED, presets)}
  if full and not settings.quick:
    # Its head is tied, so `free` would find as much as `exact`.
    subjects['SmolLM2-135M, once Q4_1'] = common.smollm2(settings), ('exact', 'near')
    folder = sliced_smollm2(settings, SPARSITY)
    subjects['SmolLM2-135M, sliced by 25%'] = folder, presets
  tables = [
    to_table(name, measure(folder, presets, settings.output))
    for name, (folder, presets) in subjects.items()
  ]
  about = (
    f'Perplexity, and KL divergence from the given model in nats per token, on '
    f'{TOKENS:,} tokens of a text. The noise floor of KL is the row "rotated, rounded '
    'again": the given model in other coordinates. Times include compilation.'
  )
  parts = [about, *tables]
  if len(subjects) > 1:
    parts.append(
      'SmolLM2-135M comes from a GGUF file whose tensors take 96.6 MB, in Q4_1 and, '
      'for the embedding, Q8_0. `exact` finds these codes again; `near` ignores them.'
    )
    parts.append(
      'Slicing damages so small a model, as its perplexity shows. The last table only '
      'compares ways to store the result.'
    )
  yield common.Section(TITLE, '\n\n'.join(parts))


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # JAX tells which devices it has not
  settings = common.Settings()
  for section in run(settings, _FULL.value):
    print(f'\n{section.body}')
  file = settings.output / f'{common.SLICED.name}-free.rotbits'
  print(f'\nThe files are in {settings.output.name}/. See what was saved:')
  print(f'  .venv/bin/rotbits inspect {file.relative_to(common.ROOT)}')


if __name__ == '__main__':
  app.run(main)
