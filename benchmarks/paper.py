"""Measures the parts of the published scheme on a sliced model.

Reference: Getting Free Bits Back from Rotational Symmetries in LLMs, arXiv 2410.01309.
"""

from collections.abc import Iterator
import pathlib
import tempfile
import time
from typing import Any

from benchmarks import common
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import presets

TITLE = 'The published scheme'
TOKENS = 2048
SCHEMES: dict[str, dict[str, Any]] = {
  'as published': {
    'canonicalizer': 'svd',
    'rotation_codec': 'symmetric_eig',
    'correction': 'threshold',
  },
  'exact corrections': {'canonicalizer': 'svd', 'rotation_codec': 'symmetric_eig'},
  'Haar codec': {'canonicalizer': 'svd'},
  'QR': {'canonicalizer': 'qr'},
  'polar factor, the default': {},
  'the same, entropy coded': {'entropy': True},
}
"""The options of the preset `paper` that are compared, each with the last."""


def schemes() -> str:
  """Returns the table of the parts of the scheme, on opt-small."""
  checkpoint = rotbits_jax.load_checkpoint(common.SLICED)
  model = checkpoint.model
  text = evaluation.encode_text(checkpoint.files, common.read_data('evaluation.txt'))
  parameters = sum(d * (d - 1) // 2 for d in model.config.segment_widths)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'x.rotbits')
    for name, options in SCHEMES.items():
      for _ in range(2):  # the first time compiles
        start = time.perf_counter()
        preset = presets.make('paper', **options)
        rotbits_jax.encode_to_file(common.SLICED, file, preset=preset, overwrite=True)
        encoded = time.perf_counter()
        decoded = common.load_model(file)
        seconds = encoded - start, time.perf_counter() - encoded
      report = rotbits_jax.inspect(file)
      net = sum(note.get('net', 0) for note in report.notes['rotations'])
      reduction = f'{1 - report.file_bytes / report.input_bytes:.2%}'
      size, back = common.megabytes(report.file_bytes), f'{net / parameters:.2f}'
      measured = evaluation.evaluate(decoded, text, reference=model, max_tokens=TOKENS)
      costs = (f'{x:.1f}' for x in seconds)
      rows.append((name, size, reduction, back, *costs, f'{measured.kl:.2g}'))
  header = ('scheme', 'MB', 'reduction', 'bits back', 'encode s', 'decode s', 'KL')
  return common.table(header, rows)


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  about = (
    'The preset `paper` on opt-small, sliced by 20%. Each row changes one part of the '
    'scheme of the row above. Bits back are net, for each of the d(d-1)/2 parameters '
    'of a rotation.'
  )
  yield common.Section(TITLE, f'{about}\n\n{schemes()}')
