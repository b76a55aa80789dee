"""JSON of strangers is JSON, bounded, and has the types of its objects."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import pytest

from rotbits_jax.system import schema
from rotbits_jax.system import strict_json


@dataclasses.dataclass(frozen=True)
class Pair:
  as_list = True
  name: str
  size: schema.Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  name: schema.Path
  kind: Literal['a', 'b']
  pairs: tuple[Pair, ...] = ()
  shape: tuple[schema.Size, schema.Size] | None = None
  shift: schema.Integer = 0
  ratio: float = 0.5
  flag: bool = False
  few: Annotated[int, schema.between(1, 3)] = 2
  by_name: dict[str, int] = dataclasses.field(default_factory=dict)
  free: Any = None

  def __post_init__(self) -> None:
    if self.flag and not self.pairs:
      raise ValueError('a flag needs pairs')


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
    assert schema.load(Record, json.loads(text), 'here') == record


def test_wrong_values_are_refused_by_name(subtests):
  for change, message in (
    ({'name': None}, 'here/name: must be a string, got None'),
    ({'name': 'x//y'}, 'here/name: must be up to 64 keys'),
    ({'kind': 'c'}, 'here/kind: must be one of a, b'),
    ({'pairs': [['p', 1], ['q']]}, 'here/pairs/1: must be a list of 2 values'),
    ({'pairs': [['p', -1]]}, 'here/pairs/0/size: must be from 0 to'),
    ({'shape': [1, True]}, 'here/shape/1: must be an integer'),
    ({'shift': 1 << 54}, 'here/shift: must be from -9007199254740992 to'),
    ({'shift': 1.0}, 'here/shift: must be an integer'),
    ({'ratio': float('inf')}, 'here/ratio: must be a finite number'),
    ({'flag': 1}, 'here/flag: must be true or false'),
    ({'flag': True}, 'here: a flag needs pairs'),
    ({'few': 4}, 'here/few: must be from 1 to 3, got 4'),
    ({'by_name': {'n': -1}}, 'here/by_name/n: must be an integer from 0'),
    ({'other': 1}, 'here/other: is not known'),
  ):
    with subtests.test(change=change):
      with pytest.raises(schema.SchemaError) as error:
        schema.load(Record, LEAST | change, 'here')
      assert str(error.value).startswith(message)


def test_missing_fields_are_refused_by_name():
  with pytest.raises(schema.SchemaError, match='here/kind: is missing'):
    schema.load(Record, {'name': 'x'}, 'here')
  with pytest.raises(schema.SchemaError, match='here: must be an object'):
    schema.load(Record, [], 'here')


def test_names_of_files_lead_nowhere_else(subtests):
  for name in ('', '.', '..', 'a/b', 'a\\b', 'a\n', 'x' * 256):
    with subtests.test(name=name):
      assert not schema.is_file_name(name)
      assert schema.is_file_name('model-00001.safetensors')


def test_json_is_parsed(subtests):
  for text, expected in (
    (b'{"a": [1, -2.5, "\\u00fc", null, true]}', {'a': [1, -2.5, 'ü', None, True]}),
    (b'1e308', 1e308),
    (b'-9223372036854775808', -(1 << 63)),
    (b'"\\ud83d\\ude00"', '😀'),
    (b'[' * 64 + b']' * 64, None),
  ):
    with subtests.test(text=text):
      value = strict_json.loads(text)
      if expected is not None:
        assert value == expected


def test_other_json_is_refused(subtests):
  for text, problem in (
    (b'', 'not JSON'),
    (b'\xff', 'not JSON'),
    (b'{"a": 1,}', 'not JSON'),
    (b'NaN', 'NaN is not JSON'),
    (b'[-Infinity]', '-Infinity is not JSON'),
    (b'1e999', '1e999 is too large'),
    (b'-1e999', '-1e999 is too large'),
    (b'1' * 20, 'is too large'),
    (b'1' * 5000, 'is too large'),
    (b'{"a": 1, "b": 2, "a": 1}', "'a' is repeated"),
    (b'"\\ud800"', 'surrogate'),
    (b'{"\\udc00": 1}', 'surrogate'),
    (b'[' * 65 + b']' * 65, 'nested too deeply'),
    (b'{"a":' * 65 + b'1' + b'}' * 65, 'nested too deeply'),
    (b'[' * 100_000, 'nested too deeply'),
  ):
    with subtests.test(problem), pytest.raises(ValueError, match=problem):
      strict_json.loads(text)
