"""Measures checkpoints and writes RESULTS.md.

  python -m benchmarks.results --checkpoints=DIR,DIR --text=FILE [--max_tokens=N]
    [--output=RESULTS.md]

Each sliced checkpoint is encoded with every preset, decoded and evaluated, as in the
demo; then with the parts of the preset `paper`; the encoder's report follows.
"""

import datetime
import pathlib
import platform
import sys
import tempfile
import time
from typing import Any

from absl import flags
import jax

from benchmarks import demo
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax.cli import evaluate
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_CHECKPOINTS = flags.DEFINE_list(
  'checkpoints',
  None,
  'Directories of sliced checkpoints.',
  required=True,
  flag_values=FLAGS,
)
_TEXT = flags.DEFINE_string(
  'text', None, 'A text to evaluate on.', required=True, flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Tokens of the text to use.', flag_values=FLAGS
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
"""Parts of the preset `paper` that are compared."""


def bits_back_table(
  path: pathlib.Path, text: str, output: pathlib.Path, max_tokens: int | None
) -> str:
  """The schemes of the preset `paper` side by side."""
  checkpoint = rotbits_jax.load_checkpoint(path)
  model, tokens = checkpoint.model, evaluation.encode_text(checkpoint.files, text)
  parameters = sum(d * (d - 1) // 2 for d in model.config.segment_widths)
  lines = [
    f'{"":24}{"bytes":>12}{"reduction":>11}{"bits back":>11}{"KL":>10}'
    f'{"encode s":>10}{"decode s":>10}'
  ]
  for name, parts in SCHEMES.items():
    start = time.perf_counter()
    data = rotbits_jax.encode(
      model,
      preset='paper',
      settings=rotbits_jax.Settings(**parts),
      files=checkpoint.files,
      stem=checkpoint.stem,
    )
    rotbits_jax.write_file(output / 'paper.rotbits', data)
    encoded = time.perf_counter()
    decoded = rotbits_jax.load(output / 'paper.rotbits')
    stop = time.perf_counter()
    report = rotbits_jax.inspect(data)
    result = evaluation.evaluate(
      decoded, tokens, reference=model, max_tokens=max_tokens
    )
    net = sum(note.get('net', 0) for note in report.notes['rotations'])
    lines.append(
      f'{name:24}{len(data):12,}{1 - len(data) / report.input_bytes:11.2%}'
      f'{net / parameters:11.2f}{result.kl:10.2g}'
      f'{encoded - start:10.1f}{stop - encoded:10.1f}'
    )
  return '\n'.join(lines)


def section(path: pathlib.Path, text: str, max_tokens: int | None) -> str:
  """One checkpoint's tables and its report."""
  with tempfile.TemporaryDirectory() as directory:
    output = pathlib.Path(directory)
    rows = list(demo.measure(path, text, output, max_tokens=max_tokens))
    report = rotbits_jax.inspect(output / 'free.rotbits').to_text()
    schemes = bits_back_table(path, text, output, max_tokens)
  return (
    f'## {path.parent.name}\n\n```\n{demo.to_text(rows)}\n```\n\n'
    'The preset `paper`; bits back are net, a parameter of a rotation:\n\n'
    f'```\n{schemes}\n```\n\n'
    f'What `free` saves, and where:\n\n```\n{report}\n```\n'
  )


def weights_file(path: pathlib.Path) -> pathlib.Path:
  """The weights of a sliced checkpoint, given itself or its directory."""
  if not path.is_dir():
    return path
  candidates = [*path.glob('*.pt'), *path.glob('*.safetensors')]
  if len(candidates) != 1:
    raise ValueError(f'{path}: {len(candidates)} weights files; name one')
  return candidates[0]


def main() -> None:
  paths = [weights_file(pathlib.Path(path)) for path in _CHECKPOINTS.value]
  text = evaluate.read_text(_TEXT.value)
  sections = [section(path, text, _MAX_TOKENS.value) for path in paths]
  tokens = f', its first {_MAX_TOKENS.value} tokens' if _MAX_TOKENS.value else ''
  program.check_output_file(_OUTPUT.value)
  device = f'{platform.machine()} {jax.devices()[0].device_kind}'
  head = (
    '# Results\n\n'
    'Written by `python -m benchmarks.results`; rerun it to measure again.\n'
    f'{datetime.date.today()}, {device}, jax {jax.__version__}. Text: '
    f'{pathlib.Path(_TEXT.value).name}{tokens}.\n'
    'Reductions are of the bytes that the tensors hold. The KL floor is the KL\n'
    'divergence of the same model rotated at random and rounded again. Seconds are\n'
    'within one process, compilation included.\n\n'
  )
  rotbits_jax.write_file(_OUTPUT.value, (head + '\n'.join(sections)).encode())


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
