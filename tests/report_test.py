"""The report as a web page, read as a browser reads it."""

import dataclasses
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
import weights_files

from fuzz import containers
from fuzz import seeds
import rotbits_jax
from rotbits_jax import report
from rotbits_jax import structured
from tests import golden

ROOT = pathlib.Path(__file__).parents[1]
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HEADINGS = {
  'free': [
    'The bytes',
    'The tensors',
    'The shortcuts',
    'The errors',
    'The published table',
    'The file',
    'To load it',
  ],
  'exact': ['The bytes', 'The tensors', 'The file', 'To load it'],
  'dense': ['The bytes', 'The tensors', 'The file', 'To load it'],
}
# A frame as wide as a phone or a desk holds the page, and the script tells its sizes.
FRAME = """<iframe width="{width}" height="900" srcdoc="{page}"></iframe><script>
const frame = document.querySelector('iframe');
frame.onload = () => {{
  const page = frame.contentDocument;
  const wide = page.documentElement.scrollWidth;
  const texts = [...page.querySelectorAll('svg text')].map(
    x => x.getBoundingClientRect().height);
  document.title = JSON.stringify({{wide: wide, least: Math.min(...texts),
    bars: page.querySelectorAll('.waterfall i').length,
    color: page.defaultView.getComputedStyle(page.body).color}});
}};</script>"""


@pytest.fixture(scope='module', name='encoded')
def fixture_encoded():
  return {preset: seeds.container(preset) for preset in ('free', 'exact')}


class Parser(html.parser.HTMLParser):
  """Collects headings, and checks that elements are closed in order."""

  VOID = frozenset(['meta', 'br'])

  def __init__(self):
    super().__init__()
    self.open, self.headings, self.addresses = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in self.VOID:
      self.open.append(tag)
    self.addresses += [x for name, x in attrs if name in ('src', 'href')]

  def handle_startendtag(self, tag, attrs):
    pass

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] == ['h2']:
      self.headings.append(data)


@pytest.mark.parametrize('name', HEADINGS)
def test_is_whole_and_needs_no_network(encoded, name):
  dense = {'a': np.ones(3)}
  data = rotbits_jax.encode(dense) if name == 'dense' else encoded[name]
  page = report.report_page(data)
  parser = Parser()
  parser.feed(page)
  assert parser.headings == HEADINGS[name]
  assert not parser.open
  assert not parser.addresses
  assert not re.search('@import|url[(]', page)


def test_says_what_inspect_says(encoded):
  page = report.report_page(encoded['free'])
  for line in rotbits_jax.inspect(encoded['free']).lines:
    if line.bytes_saved:
      assert f'{abs(line.bytes_saved):,}<' in page, line


def test_first_line_says_what_comes_back(encoded, tmp_path, rotbits):
  """Also for `paper`, which rotates every tensor and notes none of them."""
  source, path = ROOT / 'tests/testdata/phi2-tiny-sliced-0.25', tmp_path / 'phi.rotbits'
  rotbits_jax.encode_to_file(source, path, preset='exact')
  arguments = f'--input={path}', f'--output={tmp_path}/a.html', f'--against={source}'
  assert rotbits('report', *arguments)[0] == 0
  page = (tmp_path / 'a.html').read_text('utf-8')
  assert re.search('<title>phi.rotbits: [0-9.]+ MB to [0-9]+ kB</title>', page)
  assert 'Every bit comes back. Compared with the checkpoint: all' in page
  assert 'rotbits decode --input=phi.rotbits' in page
  page = report.report_page(golden.file_of('v4/paper'))
  assert 'The same function comes back, up to rounding, in other weights.' in page


def test_a_sliced_model_beside_its_dense_one_needs_no_base():
  data = ROOT / 'tests' / 'testdata'
  sliced = rotbits_jax.open_checkpoint(data / 'llama-tiny-sliced-head-0.25')
  for preset in ('exact', 'free'):
    file = rotbits_jax.encode(sliced, base=data / 'llama-tiny-dense', preset=preset)
    assert 'base=BASE' in report.report_page(file)


def test_an_embedding_that_is_predicted_from_a_head_beside_a_base():
  model = seeds.sliced_model(seeds.LLAMA | {'vocab_size': 2000})
  kernel = np.ascontiguousarray(model.params['head']['kernel'])
  changed = (kernel.view(np.uint16) + np.uint16(1)).view(kernel.dtype)
  base = {'head': {'kernel': changed}}
  data = rotbits_jax.encode(model, base=base, preset='exact')
  assert 'base=BASE' in report.report_page(data)


def test_escapes_what_a_stranger_wrote():
  data = rotbits_jax.encode({'<script>': {'a': np.ones(3)}}, preset='exact')
  assert '<script>' not in report.report_page(data)


def test_streams_are_those_of_the_file(tmp_path):
  weights_files.write_safetensors(tmp_path / 'model.safetensors', {'a': np.ones(3)})
  (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
  rotbits_jax.encode_to_file(tmp_path, tmp_path / 'out', preset='exact')
  page = report.report_page(tmp_path / 'out')
  for stream in ('a', 'files/config.json', 'gaps/model.safetensors'):
    assert f'<td>{stream}</td>' in page


@pytest.mark.parametrize('error', [1e308, 1e8, 1e-308])
def test_errors_that_a_stranger_wrote(encoded, error):
  streams, manifest = containers.unpack(encoded['free'])
  notes = [{'tensor': 'layers.0/mlp/up/kernel', 'error': error}]
  manifest['records'][0]['savings'] = [['x', 1, 1, notes]]
  report.report_page(containers.pack(streams, containers.to_json(manifest)))


def test_shortcuts_that_are_not_finite_are_left_out(encoded):
  model = rotbits_jax.decode(encoded['free'])
  flat = structured.flatten(model.params)
  names = [path for path in flat if 'shortcut' in path]
  assert names
  # Zeros stay, because those above a diagonal are not stored.
  infinite = lambda x: np.where(x == 0, x, x.dtype.type(np.inf))
  numbers = jax.tree.map(infinite, [flat[x] for x in names])
  flat |= dict(zip(names, numbers, strict=True))
  model = dataclasses.replace(model, params=structured.unflatten(flat))
  data = rotbits_jax.encode(model, preset='exact')
  streams, manifest = containers.unpack(data)
  notes = [{'tensor': 'layers.0/attention_shortcut', 'rank': 3}]
  manifest['records'][0]['savings'] = [['x', 1, 1, notes]]
  report.report_page(containers.pack(streams, containers.to_json(manifest)))


def test_arrays_of_others_may_be_named_like_a_shortcut():
  shortcut = {'kernel': np.ones((4, 4), np.float32), 'bias': np.ones(4, np.float32)}
  page = report.report_page(rotbits_jax.encode({'block': {'shortcut': shortcut}}))
  assert 'The shortcuts' not in page


def test_command_writes_the_page(encoded, tmp_path, rotbits):
  (tmp_path / 'model.rotbits').write_bytes(encoded['exact'])
  arguments = f'--input={tmp_path}/model.rotbits', f'--output={tmp_path}/a.html'
  assert rotbits('report', *arguments) == (0, '', '')
  assert (tmp_path / 'a.html').read_text('utf-8').startswith('<!doctype html>')


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on PATH')
@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('dark', [False, True])
def test_fits_a_browser(encoded, tmp_path, width, dark):
  page = report.report_page(encoded['free'])
  frame = FRAME.format(width=width, page=page.replace('"', '&quot;'))
  (tmp_path / 'frame.html').write_text(frame, 'utf-8')
  command = [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom']
  command += ['--window-size=1400,1000', '--virtual-time-budget=5000']
  command += [f'--user-data-dir={tmp_path}/profile']
  command += ['--blink-settings=preferredColorScheme=0'] if dark else []
  found = subprocess.run(
    [*command, f'file://{tmp_path}/frame.html'],
    capture_output=True,
    check=True,
    text=True,
    timeout=120,
  )
  title = re.search('<title>(.*?)</title>', found.stdout)[1]
  sizes = json.loads(title.replace('&quot;', '"'))
  assert sizes['wide'] <= width
  assert sizes['least'] >= 9  # pixels: text in charts stays legible
  assert sizes['bars'] > 4
  assert sizes['color'] == ('rgb(230, 237, 243)' if dark else 'rgb(28, 33, 40)')
