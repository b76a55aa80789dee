"""The page of the file format names what the code writes: fields, settings, arrays."""

import json
import pathlib
import re

import numpy as np

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import specs
from rotbits_jax.file import manifest
from rotbits_jax.file import shards
from rotbits_jax.relative import measure
from rotbits_jax.relative import products
from tests import cases

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
PAGES = ''.join(
  (DOCS / x).read_text('utf-8') for x in ('format.md', 'format_leaves.md')
)


def names(text):
  return set(re.findall(r'`(\w+)`', text))


def documented(introduction):
  """The names in the first column of the table that follows a sentence of the page."""
  words = r'\s+'.join(map(re.escape, introduction.split()))
  _, after = re.split(words, PAGES)
  table = re.search(r'\| field \| value \|\n\|---\|---\|\n((?:\|.*\n)+)', after)
  return names(''.join(row.split('|')[1] for row in table[1].splitlines()))


def field_names(cls):
  """The names of an object's fields in JSON."""
  return set(cls.__struct_fields__)


def test_fields_of_objects(subtests):
  for introduction, cls in (
    ('The stream `manifest` is a zlib stream of a JSON object.', manifest.Manifest),
    ('A *record* decodes on its own', manifest.RecordEntry),
    ('A *leaf* is one parameter:', manifest.Leaf),
    ('The field `spec` of a record describes its stream:', specs.StreamSpec),
    ('`rotbits_jax.models.ModelConfig` says', models.ModelConfig),
    ('The object `product` has', products.Product),
    ('The object `rope_scaling` has', models.RopeScaling),
    ('A file with a message has no records', manifest.MessageEntry),
  ):
    with subtests.test(introduction=introduction):
      assert documented(introduction) == field_names(cls)


def test_fields_of_the_index():
  fields = documented('The folder has an index, a JSON object in the file')
  assert fields == field_names(shards.ShardIndex)
  (row,) = re.findall(r'^\| `metadata` \| object: (.*)', PAGES, re.M)
  assert field_names(shards.Metadata) == names(row) - {'manifest'}


def test_metadata_of_the_header():
  data = rotbits_jax.encode({'x': np.arange(2)})
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  _, _, after = PAGES.partition('The header maps `__metadata__`')
  listed = re.findall(r'^- `(\w+)` is ', after.partition('Every other key')[0], re.M)
  assert set(listed) == set(header['__metadata__'])


def exact_embedding():
  rng = np.random.default_rng(0)
  head = rng.normal(size=(6, 40)).astype(np.float16)
  table = rng.normal(size=(40, 5)).astype(np.float16)
  map = rng.integers(-(1 << 14), 1 << 14, (6, 5)).astype(np.int16)
  return measure.beside_head(table, head, map, 14).leaf


def test_settings_and_arrays_of_leaves(subtests):
  for leaf in (
    *cases.leaves().values(),
    *(leaf for leaf, _ in cases.leaves_beside_base().values()),
    exact_embedding(),
  ):
    with subtests.test(leaf=leaf.type_name):
      text = PAGES
      row, paragraph = (
        rf'^\| `{leaf.type_name}` \|.*',
        rf'^\*\*`{leaf.type_name}`\.\*\*(?:.+\n)+',
      )
      about = re.findall(f'{row}|{paragraph}', text, re.M)
      if leaf.type_name == 'difference':
        about += re.findall(r'^## Differences from (?:.|\n)+?^## ', text, re.M)
      settings, arrays = leaf.stored()
      assert {*settings, *arrays} <= names(' '.join(about))


def test_every_type_is_in_the_table():
  text = PAGES
  rows = re.findall(r'^\| ((?:`\w+`,? ?)+)\| (?:.*\| ){2}', text, re.M)
  own = {k for k, x in structured.TYPES.items() if x.__module__.startswith('rotbits_')}
  assert own <= names(' '.join(rows))
