"""JSON of strangers is JSON, bounded, and has the types of its objects."""

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest

from rotbits_jax import checkpoints
from rotbits_jax.system import schema


class Pair(schema.Row):
  name: str
  size: schema.Size


class Record(schema.Object):
  name: schema.Path
  kind: Literal['a', 'b']
  pairs: tuple[Pair, ...] = ()
  shape: tuple[schema.Size, schema.Size] | None = None
  shift: schema.Integer = 0
  ratio: float = 0.5
  flag: bool = False
  few: Annotated[int, schema.between(1, 3)] = 2
  by_name: dict[str, schema.Size] = msgspec.field(default_factory=dict)
  free: Any = None

  def __post_init__(self) -> None:
    if self.flag and not self.pairs:
      raise ValueError('a flag needs pairs')


HARMFUL = (
  '.git/config', 'a/.gitattributes', '.envrc', 'x/.ssh/authorized_keys', '-rf', '~',
  'a/~b/c', '__pycache__/x.pyc', 'a/__PyCache__/x.pyc',
)  # fmt: skip
LEAST = {'name': 'x/y', 'kind': 'a'}
FULL = Record(
  name='x/y',
  kind='b',
  pairs=(Pair('p', 3), Pair('q', 0)),
  shape=(2, 3),
  shift=-4,
  ratio=1.0,
  flag=True,
  few=3,
  by_name={'n': 1},
  free=[{'any': None}],
)


def test_round_trip_through_json():
  for record in (FULL, Record(name='x', kind='a')):
    text = json.dumps(schema.dump(record))
    assert schema.decode(Record, text) == record
  assert schema.dump(Record(**LEAST)) == LEAST


def test_wrong_values_are_refused_by_name(subtests):
  for change, message in (
    ({'name': None}, 'name'),
    ({'name': 'x//y'}, 'name'),
    ({'kind': 'c'}, 'kind'),
    ({'pairs': [['p', 1], ['q']]}, r'pairs\[1\]'),
    ({'pairs': [['p', 1, 2]]}, r'pairs\[0\]'),
    ({'pairs': [['p', -1]]}, r'pairs\[0\]\[1\]'),
    ({'shape': [1, True]}, r'shape\[1\]'),
    ({'shift': 1 << 54}, 'shift'),
    ({'shift': 1.5}, 'shift'),
    ({'flag': 1}, 'flag'),
    ({'flag': True}, 'a flag needs pairs'),
    ({'few': 4}, 'few'),
    ({'by_name': {'n': -1}}, 'by_name'),
    ({'other': 1}, 'other'),
  ):
    words = f'here: .*{message}'
    with subtests.test(change=change), pytest.raises(ValueError, match=words):
      schema.load(Record, LEAST | change, 'here')
  for value, message in (({'name': 'x'}, 'kind'), ([], 'object')):
    with pytest.raises(ValueError, match=message):
      schema.load(Record, value)


def test_names_of_files_lead_nowhere_else(subtests):
  for name in ('', '.', '..', 'a/b', 'a\\b', 'a\n', 'x' * 256):
    with subtests.test(name=name):
      assert not checkpoints.is_relative_path(name, levels=1)
      assert checkpoints.is_relative_path('model-00001.safetensors', levels=1)
  for name in HARMFUL:
    with subtests.test(name=name):
      assert not checkpoints.is_relative_path(name)
  assert all(map(checkpoints.is_relative_path, ('.gitattributes', 'a-b/c~', 'x.git/y')))


def test_json_is_parsed(subtests):
  for text, expected in (
    (b'{"a": [1, -2.5, "\\u00fc", null, true]}', {'a': [1, -2.5, 'ü', None, True]}),
    (b'1e308', 1e308),
    (b'-9223372036854775808', -(1 << 63)),
    (b'"\\ud83d\\ude00"', '😀'),
    (b'[' * 64 + b']' * 64, None),
  ):
    with subtests.test(text=text):
      value = schema.decode(Any, text)
      if expected is not None:
        assert value == expected


def test_other_json_is_refused(subtests):
  for text, problem in (
    (b'', 'JSON'),
    (b'\xff', 'JSON'),
    (b'{"a": 1,}', 'JSON'),
    (b'NaN', 'JSON'),
    (b'[-Infinity]', 'JSON'),
    (b'1e999', 'JSON'),
    (b'-1e999', 'JSON'),
    (b'1' * 5000, 'JSON'),
    (b'{"a": 1, "b": 2, "a": 1}', 'repeated'),
    (b'"\\ud800"', 'JSON'),
    (b'{"\\udc00": 1}', 'JSON'),
    (b'[' * 100_000, 'JSON'),
  ):
    with subtests.test(problem), pytest.raises(ValueError, match=problem):
      schema.decode(Any, text)
