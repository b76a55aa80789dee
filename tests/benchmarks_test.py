"""The benchmarks run on small subjects, and RESULTS.md is what they write."""

import pathlib
import re

import pytest

from benchmarks import __main__ as runner
from benchmarks import common
from benchmarks import demo

RESULTS = common.ROOT / 'RESULTS.md'


def test_every_benchmark_is_there():
  folder = pathlib.Path(runner.__file__).parent
  for name in runner.BENCHMARKS:
    assert '\ndef run(' in (folder / f'{name}.py').read_text('utf-8')


@pytest.mark.slow
@pytest.mark.daily
def test_demo(tmp_path):
  (section,) = demo.run(common.Settings(output=tmp_path), full=False)
  for preset in ('exact', 'free', 'near'):
    assert f'`{preset}`' in section.body
  assert 'every bit' in section.body


def test_every_section_is_written_by_a_benchmark():
  text = RESULTS.read_text('utf-8')
  titles = re.findall(r'^## .*$', text, re.M)
  named = re.findall(r'^## .*\n\n`python -m benchmarks (\w+)`', text, re.M)
  assert len(named) == len(titles)
  assert set(named) <= set(runner.BENCHMARKS)
  assert text.count(': start -->') == text.count(': end -->') == len(titles)
