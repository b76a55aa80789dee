"""Measures checkpoints and writes RESULTS.md.

  python -m benchmarks.results --checkpoints=DIR,DIR [--smollm2=0.2,0.25,0.3]
    --text=FILE [--max_tokens=N] [--output=RESULTS.md]

The program encodes each sliced checkpoint with every preset, decodes it and evaluates
it, as the demo does. The report of the encoder follows. The options of the preset
`paper` are compared on the first checkpoint.
"""

import datetime
import functools
import math
import pathlib
import platform
import re
import sys
import tempfile
from typing import Any

from absl import flags
import jax

from benchmarks import demo
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import outputs
from rotbits_jax.cli import program
from rotbits_jax.file import report as report_lib

FLAGS = flags.FlagValues()
_CHECKPOINTS = flags.DEFINE_list(
  'checkpoints',
  None,
  'Directories of sliced checkpoints.',
  required=True,
  flag_values=FLAGS,
)
_SMOLLM2 = flags.DEFINE_list(
  'smollm2',
  [],
  'Sparsities for slicing SmolLM2-135M; needs the extra `demo`.',
  flag_values=FLAGS,
)
_TEXT = flags.DEFINE_string(
  'text', None, 'The evaluation text.', required=True, flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Number of tokens of the text to use.', flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
  'output', 'RESULTS.md', 'The file to write.', flag_values=FLAGS
)


SCHEMES: dict[str, dict[str, Any]] = {
  'published': {
    'canonicaliser': 'svd',
    'rotation_codec': 'symmetric_eig',
    'correction': 'threshold',
  },
  'published, exact': {'canonicaliser': 'svd', 'rotation_codec': 'symmetric_eig'},
  'svd, haar': {'canonicaliser': 'svd'},
  'qr, haar': {'canonicaliser': 'qr'},
  'polar_shortcut, haar': {},
  'the same, entropy coded': {'entropy': True},
}
"""The options of the preset `paper` that are compared."""


def bits_back_table(
  path: pathlib.Path, text: str, output: pathlib.Path, max_tokens: int | None
) -> str:
  """Returns a table of the schemes of the preset `paper`."""
  checkpoint = rotbits_jax.load_checkpoint(path)
  model, tokens = checkpoint.model, evaluation.encode_text(checkpoint.files, text)
  parameters = sum(d * (d - 1) // 2 for d in model.config.segment_widths)
  lines = [
    f'{"":24}{"bytes":>12}{"reduction":>11}{"bits back":>11}{"KL":>10}'
    f'{"encode s":>10}{"decode s":>10}'
  ]
  for name, parts in SCHEMES.items():
    file = output / 'paper.rotbits'
    timed = demo.encode_and_load(checkpoint, file, 'paper', **parts)
    report = rotbits_jax.inspect(file)
    result = evaluation.evaluate(
      timed.model, tokens, reference=model, max_tokens=max_tokens
    )
    net = sum(note.get('net', 0) for note in report.notes['rotations'])
    lines.append(
      f'{name:24}{timed.bytes:12,}{1 - timed.bytes / report.input_bytes:11.2%}'
      f'{net / parameters:11.2f}{result.kl:10.2g}'
      f'{timed.encode_seconds:10.1f}{timed.decode_seconds:10.1f}'
    )
  return '\n'.join(lines)


def groups_table(report: report_lib.Report) -> str:
  """Returns a table of the savings of each transform; equal layers share a line."""
  size = report.input_bytes / report.input_numbers
  lines = [
    f'{"group":18}{"where":38}{"form":20}{"numbers":>11}{"bytes":>11}{"error":>9}'
  ]
  for source in report.sources:
    places: dict[tuple[str, str], list[float]] = {}
    for note in report.notes.get(source.name, []):
      if 'shape' in note:
        place = re.sub(r'layers\.\d+', 'layers.*', note['tensor'])
        total = places.setdefault((place, note['form']), [0, 0.0])
        total[0] += math.prod(note['shape']) - note['numbers']
        total[1] = max(total[1], note['error'])
    for (where, form), (numbers, error) in places.items():
      lines.append(
        f'{source.name:18}{where:38}{form:20}{numbers:11,.0f}{numbers * size:11,.0f}'
        f'{error:9.2g}'
      )
    if not places and (source.numbers_saved or source.bytes_saved):
      lines.append(
        f'{source.name:76}{source.numbers_saved:11,}{source.bytes_saved:11,}'
      )
  return '\n'.join(lines)


def section(path: pathlib.Path, text: str, max_tokens: int | None) -> str:
  """Returns the tables and the report of one checkpoint."""
  with tempfile.TemporaryDirectory() as directory:
    output = pathlib.Path(directory)
    sliced = demo.Sliced(rotbits_jax.load_checkpoint(path), path)
    rows = demo.measure(sliced, text, output, max_tokens=max_tokens)
    report = rotbits_jax.inspect(output / 'free.rotbits')
  return (
    f'## {path.parent.name}\n\n```\n{demo.to_text(rows)}\n```\n\n'
    'The numbers and uncoded bytes that `free` saves in each tensor. The error is the\n'
    'greatest relative error of a tensor, or of a product that does not change:\n\n'
    f'```\n{groups_table(report)}\n```\n\n```\n{totals(report)}\n```\n'
  )


def schemes_section(path: pathlib.Path, text: str, max_tokens: int | None) -> str:
  """Returns the table of the options of the preset `paper` on one checkpoint."""
  with tempfile.TemporaryDirectory() as directory:
    schemes = bits_back_table(path, text, pathlib.Path(directory), max_tokens)
  return (
    f'## The preset `paper` on {path.parent.name}\n\n'
    'Bits back are net, per free number of a rotation.\n\n'
    f'```\n{schemes}\n```\n'
  )


def totals(report: report_lib.Report) -> str:
  """Returns the report without its notes."""
  return report._replace(notes={}).to_text()


def smollm2_section(sparsity: float, text: str) -> str:
  """Slices SmolLM2-135M; returns the demo's table and the report."""
  with tempfile.TemporaryDirectory() as directory:
    output = pathlib.Path(directory)
    sliced = demo.slice_smollm2(sparsity, output)
    tokens = demo.EVALUATION_TOKENS
    rows = demo.measure(sliced, text, output, max_tokens=tokens)
    report = rotbits_jax.inspect(output / 'free.rotbits')
  return (
    f'## SmolLM2-135M-Instruct, sliced by {sparsity:.0%}\n\n'
    f'Sliced by `rotbits_jax.slicing` in {sliced.seconds:.0f} s; {tokens:,} tokens.\n'
    'The truth is the sliced model before it was rounded to float16.\n\n'
    f'```\n{demo.to_text(rows)}\n```\n\n```\n{totals(report)}\n```\n'
  )


def weights_file(path: pathlib.Path) -> pathlib.Path:
  """Returns the weights file of a sliced checkpoint, given that file or a directory."""
  if not path.is_dir():
    return path
  candidates = [*path.glob('*.pt'), *path.glob('*.safetensors')]
  if len(candidates) != 1:
    raise ValueError(f'{path}: expected one weights file, got {len(candidates)}')
  return candidates[0]


def main() -> None:
  paths = [weights_file(pathlib.Path(path)) for path in _CHECKPOINTS.value]
  text = program.read_text(_TEXT.value)
  tokens = f', its first {_MAX_TOKENS.value} tokens' if _MAX_TOKENS.value else ''
  outputs.check(outputs.resolved(_OUTPUT.value), overwrite=True)
  device = f'{platform.machine()} {jax.devices()[0].device_kind}'
  results = (
    '# Results\n\n'
    'Written by `python -m benchmarks.results`. Rerun it to measure again.\n'
    f'{datetime.date.today()}, {device}, jax {jax.__version__}. Text: '
    f'{pathlib.Path(_TEXT.value).name}{tokens}.\n'
    'Reductions are relative to the bytes of the tensors. KL is the divergence from\n'
    'the raw tensors, in nats. Rounding alone makes the KL in the line "rotated,\n'
    'rounded again". Seconds are measured in one process and include compilation.\n'
  )
  measured = [
    functools.partial(smollm2_section, float(s), text) for s in _SMOLLM2.value
  ]
  measured += [
    functools.partial(part, path, text, _MAX_TOKENS.value)
    for part, some in ((section, paths), (schemes_section, paths[:1]))
    for path in some
  ]
  for measure in measured:
    results += '\n' + measure()
    # The finished sections are kept even if a later one fails.
    pathlib.Path(_OUTPUT.value).write_text(results)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
