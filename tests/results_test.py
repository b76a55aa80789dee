"""RESULTS.md is what the benchmarks print."""

import pathlib
import re

from benchmarks import all as all_benchmarks

RESULTS = pathlib.Path(__file__).parents[1] / 'RESULTS.md'


def test_every_section_is_written_by_a_benchmark():
  text = RESULTS.read_text('utf-8')
  known = {own.module for own in all_benchmarks.BENCHMARKS.values()}
  for section in re.split(r'^## ', text, flags=re.MULTILINE)[1:]:
    title, body = section.split('\n', 1)
    named = re.findall(r'python -m ([\w.]+)', body)
    assert named, title
    assert named[0] in known, title
