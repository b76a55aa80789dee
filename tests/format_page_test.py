"""The page of the file format names what the code writes: fields, settings, arrays."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import manifest
from rotbits_jax.file import shards

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'format.md'
STREAM = manifest.Stream(name='rest/x', nbytes=0, crc32=0)


def names(text):
  return set(re.findall(r'`(\w+)`', text))


def documented(introduction):
  """The names in the first column of the table that follows a sentence of the page."""
  words = r'\s+'.join(map(re.escape, introduction.split()))
  _, after = re.split(words, PAGE.read_text('utf-8'))
  table = re.search(r'\| field \| value \|\n\|---\|---\|\n((?:\|.*\n)+)', after)
  return names(''.join(row.split('|')[1] for row in table[1].splitlines()))


def unit():
  return manifest.Record(
    name='a',
    nbytes=0,
    crc32=0,
    leaves=(),
    coder=weights.StreamSpec(arrays=(), layouts=(), groups=()),
    input_numbers=0,
    input_bytes=0,
    savings=(),
    order_bits=0.0,
    empty=('a',),
  )


def weights_file():
  layout = checkpoints.WeightsFile('x', 0, ())
  return manifest.WeightsFile(layout=layout, rest=STREAM)


def whole_manifest():
  """A manifest in which no field is left out."""
  made = manifest.Manifest(
    preset='exact',
    options={},
    config=None,
    stem=None,
    units=(),
    message=None,
    files=(),
    sizes=(),
    weights=(weights_file(),),
  )
  return json.loads(made.to_bytes())


def message():
  return manifest.Message(
    layout={}, streams=(), input_numbers=0, input_bytes=0, savings=()
  )


def field_names(cls):
  return {field.name for field in dataclasses.fields(cls)}


def index(folder):
  shards.write_index(folder / 'index', {})
  return json.loads((folder / 'index').read_text())


@pytest.mark.parametrize(
  ('introduction', 'written'),
  [
    ('The stream `manifest` is a JSON object.', whole_manifest()),
    ('A *unit* decodes on its own', unit().to_json()),
    (
      'A *leaf* is one parameter:',
      manifest.leaf_of('x', structured.Constant.like(np.ones(2), 1.0))[0].to_json(),
    ),
    ('The field `coder` of a unit describes its stream:', unit().coder.to_json()),
    ('`rotbits_jax.models.ModelConfig` says', field_names(models.ModelConfig)),
    ('The object `rope_scaling` has', field_names(models.RopeScaling)),
    ('The preset `paper` has no units', message().to_json()),
    ('says how a weights file', weights_file().to_json()),
  ],
)
def test_fields_of_objects(introduction, written):
  assert documented(introduction) == set(written)


def test_fields_of_the_index(tmp_path):
  written = index(tmp_path)
  assert documented('index, a JSON object in a file') == set(written)
  (row,) = re.findall(r'^\| `metadata` \| object: (.*)', PAGE.read_text('utf-8'), re.M)
  assert set(written['metadata']) == names(row) - {'manifest'}


def test_metadata_of_the_header():
  data = rotbits_jax.encode({'x': np.arange(2)})
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  _, _, after = PAGE.read_text('utf-8').partition('The header maps `__metadata__`')
  listed = re.findall(r'^- `(\w+)` is ', after.partition('Every other key')[0], re.M)
  assert set(listed) == set(header['__metadata__'])


def test_options_that_readers_need():
  listed = re.findall(r'^- `([\w ]+)`: ', PAGE.read_text('utf-8'), re.M)
  assert {manifest.DTYPE, manifest.OTHER_DTYPES} <= set(listed)


def exact_embedding():
  rng = np.random.default_rng(0)
  head = rng.normal(size=(6, 40)).astype(np.float16)
  table = rng.normal(size=(40, 5)).astype(np.float16)
  map = rng.integers(-(1 << 20), 1 << 20, (6, 5)).astype(np.int32)
  return structured.TiedExactly.from_table(table, head, map, np.full(6, 20))


@pytest.mark.parametrize(
  'leaf', [*seeds.leaves().values(), exact_embedding()], ids=lambda leaf: leaf.kind
)
def test_settings_and_arrays_of_leaves(leaf):
  text = PAGE.read_text('utf-8')
  row, paragraph = rf'^\| `{leaf.kind}` \|.*', rf'^\*\*`{leaf.kind}`\.\*\*(?:.+\n)+'
  about = re.findall(f'{row}|{paragraph}', text, re.M)
  if isinstance(leaf, structured.Packed):
    about += re.findall(r'^The settings of all three kinds(?:.+\n)+', text, re.M)
  settings, arrays = leaf.stored()
  # There is an array of residuals for each class.
  written = {re.sub(r'residuals_\d+', 'residuals_0', x) for x in (*settings, *arrays)}
  assert written <= names(' '.join(about))


def test_names_of_factors():
  (paragraph,) = re.findall(
    r'^\*\*`low_rank`, `reduced_low_rank`\.\*\*(?:.+\n)+', PAGE.read_text('utf-8'), re.M
  )
  assert set(checkpoints.FACTORS) <= names(paragraph)


def test_every_kind_is_in_the_table():
  text = PAGE.read_text('utf-8')
  rows = re.findall(r'^\| ((?:`\w+`,? ?)+)\| (?:.*\| ){2}', text, re.M)
  own = {k for k, x in structured.TYPES.items() if x.__module__.startswith('rotbits_')}
  assert own <= names(' '.join(rows))
