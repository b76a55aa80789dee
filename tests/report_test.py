"""The report as a web page: complete, of no network, and safe with hostile notes."""

import html
import pathlib
import re
import resource

import numpy as np
import pytest

from fuzz import containers
from fuzz import seeds
import rotbits_jax
from rotbits_jax.file import report

TESTDATA = pathlib.Path(__file__).parent / 'testdata'


def encoded(name):
  if name == 'tree':
    return rotbits_jax.encode({'<script>': {'a': np.ones(3)}})
  return seeds.container(name)


@pytest.mark.parametrize('name', ['free', 'exact', 'tree'])
def test_page_is_whole_and_says_what_inspect_says(name):
  data = encoded(name)
  page = report.report_page(data)
  notes = map(html.escape, rotbits_jax.inspect(data).notes)
  for heading in (*notes, 'to load it'):
    assert f'\n\n{heading}:\n' in page
  assert not re.search('@import|url[(]|<script>| src=| href=', page)
  found = rotbits_jax.inspect(data)
  text = found.to_text()
  assert html.escape(text) in page
  assert sum(x.bytes_saved for x in found.lines) == found.input_bytes - found.file_bytes
  for line in found.lines:
    if line.bytes_saved:
      assert f'{abs(line.bytes_saved):,} ' in text


@pytest.mark.parametrize(
  'note',
  [
    {'tensor': 'layers.0/mlp/up/kernel', 'error': 1e308},
    {'tensor': '<script>', 'error': 1e-308},
    {f'field {i}': i for i in range(32)},
  ],
)
def test_notes_that_a_stranger_wrote(note):
  streams, manifest = containers.unpack(seeds.container('free'))
  for i, record in enumerate(manifest['records']):
    record['savings'] = [
      ['x', 1, 1 << 50, [note | {f'other {i}': 1}][: len(note) < 32]]
    ]
  data = containers.pack(streams, containers.to_json(manifest))
  assert '<script>' not in report.report_page(data)
  rotbits_jax.inspect(data).to_text(verbose=True)


def test_command_writes_the_page(tmp_path, rotbits):
  source, path = TESTDATA / 'phi2-tiny-sliced-0.25', tmp_path / 'phi.rotbits'
  rotbits_jax.encode_to_file(source, path, preset='exact')
  command = 'report', path, tmp_path / 'a.html'
  assert rotbits(*command)[0] == 0
  page = (tmp_path / 'a.html').read_text('utf-8')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if disks were full
  try:
    assert rotbits(*command, '--overwrite')[0] == 2
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert (tmp_path / 'a.html').read_text('utf-8') == page
  assert re.search('<title>phi.rotbits: [0-9.]+MB to [0-9]+kB', page)
  assert 'Every bit comes back.' in page


def test_the_page_of_a_tree_names_what_loads_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  base = {'w': np.ones((64, 64), np.float16)}
  rotbits_jax.encode_to_file({'w': base['w'] * 2}, 'x.rotbits', base=base)
  page = html.unescape(report.report_page('x.rotbits'))
  assert 'rotbits decode' not in page
  assert '--base' not in page
  names = {'rotbits_jax': rotbits_jax, 'BASE': base}
  exec(re.search(r"content = .*'x.rotbits'.*\)", page)[0], names)
  np.testing.assert_array_equal(names['content']['w'], base['w'] * 2)
