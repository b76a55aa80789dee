"""Measures checkpoints and writes RESULTS.md.

  python -m benchmarks.results --checkpoints=DIR,DIR --text=FILE [--max_tokens=N]
    [--output=RESULTS.md]

Each sliced checkpoint is encoded with every preset, decoded and evaluated, as in the
demo; the encoder's report follows.
"""

import datetime
import pathlib
import platform
import sys
import tempfile

from absl import flags
import jax

from benchmarks import demo
import rotbits_jax
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


def section(path: pathlib.Path, text: str, max_tokens: int | None) -> str:
  """One checkpoint's table and its report."""
  with tempfile.TemporaryDirectory() as directory:
    output = pathlib.Path(directory)
    rows = list(demo.measure(path, text, output, max_tokens=max_tokens))
    report = rotbits_jax.inspect(output / 'free.rotbits').to_text()
  return (
    f'## {path.parent.name}\n\n```\n{demo.to_text(rows)}\n```\n\n'
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
