"""Runs the tests of trust class by class, slow ones too, and counts cases and failures.

  python -m fuzz.classes [--results=RESULTS.md]

A case is a test or a subtest. The exit code is 1 if there was a failure. What is random
or exhaustive has counts of its own: see `fuzz.run`, `fuzz.sweep` and `fuzz.faults`.
"""

from collections.abc import Sequence
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple
from xml.etree import ElementTree

from absl import flags

from benchmarks import sections
from rotbits_jax.cli import program

ROOT = pathlib.Path(__file__).parent.parent

FLAGS = flags.FlagValues()
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file whose section of counts is written anew.', flag_values=FLAGS
)


class Class(NamedTuple):
  """A class of tests: what is tried, and pytest's names of the tests."""

  tried: str
  tests: tuple[str, ...]


CLASSES = {
  'outputs': Class(
    'FIFOs, links, modes, read-only folders, files that exist, signals',
    (
      'tests/outputs_test.py',
      'tests/cli_test.py::TestBadInput::test_files_that_exist_need_overwrite',
      'tests/cli_test.py::TestBadInput::test_no_other_kinds_of_files_are_replaced',
      'tests/cli_test.py::TestBadInput::test_decoding_over_a_file',
      'tests/cli_test.py::TestProcess::test_a_signal_leaves_nothing',
      'tests/sweep_test.py::test_decode_leaves_nothing_behind',
    ),
  ),
  'determinism': Class(
    'golden files: jit off, x64, precision, promotion, AVX2, 1, 2, 8 devices; NumPy',
    (
      'tests/golden_test.py',
      'tests/file_test.py::DevicesTest',
      'tests/numpy_decoder_test.py',
      'tests/paper_test.py::SlowSchemeTest::test_same_bits_without_jit',
    ),
  ),
  'edges': Class(
    'NaN, infinite, subnormal and greatest numbers; empty, huge and deep trees',
    ('tests/edges_test.py', 'tests/plain_test.py::TreeTest'),
  ),
  "paper's margin": Class(
    'factorisations with rounding errors of another machine, and beyond the margin',
    (
      'tests/paper_test.py::MarginTest',
      'tests/haar_test.py::RecoveryTest',
      'tests/symmetric_eig_test.py::SymmetricEigTest',
      'tests/correction_test.py',
    ),
  ),
  'load': Class(
    '16 readers at once, 1,000 encodes and decodes in a process, memory freed',
    ('tests/load_test.py',),
  ),
  'shards and resume': Class(
    'missing and foreign shards, indices that lie, runs killed and continued',
    ('tests/file_test.py::ShardsTest', 'tests/resume_test.py'),
  ),
  'inspect and verify': Class(
    'damage, other bits and other functions named; every field of the manifest',
    (
      'tests/verification_test.py',
      'tests/container_test.py',
      'tests/file_test.py::ReaderTest',
      'tests/cli_test.py::TestInspect',
      'tests/cli_test.py::TestVerify',
    ),
  ),
  'hostile checkpoints': Class(
    'pickles, zips, safetensors, GGUF, configs and JSON that lie about what they hold',
    (
      'tests/checkpoints_torch_zip_test.py::TestRefusals',
      'tests/checkpoints_torch_zip_test.py::TestPlaces',
      'tests/checkpoints_test.py::TestConfig',
      'tests/configs_test.py',
      'tests/checkpoints_test.py::TestSlicing',
      'tests/checkpoints_test.py::TestSafetensors',
      'tests/gguf_test.py::TestRefused',
      'tests/strict_json_test.py',
      'tests/fuzz_test.py::test_inputs_of_the_corpus_end_in_the_error_that_is_promised',
    ),
  ),
}


class Counts(NamedTuple):
  """What pytest counts in a run: cases, those of them that were not run, failures."""

  cases: int
  skipped: int
  failures: int
  seconds: float


def run(tests: Sequence[str]) -> Counts:
  """Runs tests in another process, and prints what pytest says of failures.

  Raises:
    RuntimeError: if pytest does not find a test or cannot run.
  """
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / 'report.xml'
    options = ['-o', 'addopts=', '-q', '-m', '', f'--junitxml={report}']
    done = subprocess.run(
      [sys.executable, '-m', 'pytest', *options, *tests],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      check=False,
    )
    if done.returncode not in (0, 1):
      raise RuntimeError(f'pytest ended with {done.returncode}: {done.stdout[-2000:]}')
    (suite,) = ElementTree.parse(report).getroot()
  if done.returncode:
    print(done.stdout, flush=True)
  count = lambda name: int(suite.attrib[name])
  return Counts(
    cases=count('tests'),
    skipped=count('skipped'),
    failures=count('failures') + count('errors'),
    seconds=float(suite.attrib['time']),
  )


def to_text(found: dict[str, Counts]) -> str:
  """Returns a table of the counts."""
  lines = [f'{"class":24}{"cases":>8}{"skipped":>9}{"failures":>10}{"seconds":>9}']
  for name, x in found.items():
    lines.append(
      f'{name:24}{x.cases:8,}{x.skipped:9,}{x.failures:10,}{x.seconds:9,.0f}'
    )
    lines.append(f'  {CLASSES[name].tried}')
  return '\n'.join(lines)


def main() -> None:
  found: dict[str, Counts] = {}
  for name, own in CLASSES.items():
    found[name] = run(own.tests)
    print(to_text({name: found[name]}), flush=True)
  if _RESULTS.value:
    body = sections.with_table(_ABOUT, to_text(found))
    sections.write(_RESULTS.value, _TITLE, body)
  if any(x.failures for x in found.values()):
    raise SystemExit(1)


_TITLE = 'What is tried: tests by class'

_ABOUT = """\
Written by `python -m fuzz.classes --results=RESULTS.md`, which runs the tests of each
class, slow ones too. A case is a test or a subtest, and may try many inputs."""


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
