"""The types that type checkers and editors see."""

import ast
import importlib
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import rotbits_jax

PACKAGE = pathlib.Path(rotbits_jax.__file__).parent

CLIENT = """
import pathlib
from typing import Any, assert_type

import jax
import numpy as np

import rotbits_jax
from rotbits_jax import file
from rotbits_jax import models

tree = {'w': np.ones((4, 4), np.float32), 'steps': [1, (2.5, jax.numpy.ones(3))]}
data = rotbits_jax.encode(tree, preset='near', step=-4, metadata={'run': 'a'})
assert_type(data, bytes)
rotbits_jax.encode(tree, preset=rotbits_jax.presets.exact())
rotbits_jax.encode_to_file(pathlib.Path('x'), 'y', base=[data, 'x'], shard_size=9)
with rotbits_jax.open(data, base='x') as reader:
  assert_type(reader, file.Reader)
  assert_type(reader.keys(), list[str])
  assert_type(reader.metadata, dict[str, str])
assert_type(rotbits_jax.read_record(reader, 'w'), dict[str, Any])
assert_type(rotbits_jax.load(reader, layers=range(2)), models.Model | dict[str, Any])
assert_type(rotbits_jax.load(reader, like=tree), Any)
model = rotbits_jax.load_checkpoint('x').model
assert_type(rotbits_jax.models.logits(model, jax.numpy.ones((1, 2))), jax.Array)
assert_type(rotbits_jax.apply(data, model), models.Model)
_, gauges = rotbits_jax.canonicalize(model.params, model.config)
assert_type(gauges, rotbits_jax.symmetries.Gauges)
assert_type(rotbits_jax.inspect(reader).metadata, dict[str, str])
rotbits_jax.encode(None)
rotbits_jax.encode(object())
rotbits_jax.encode(tree, preset=3)
rotbits_jax.encode(tree, metadata={'run': 1})
rotbits_jax.decode(3)
rotbits_jax.load(data, like=tree, layers=range(2))
"""

WRONG = 6  # lines at the end of the client


@pytest.mark.parametrize('name', ['rotbits_jax', 'rotbits_jax.models'])
def test_type_checkers_see_each_lazy_name(name):
  module = importlib.import_module(name)
  checked = {}
  for node in ast.parse(inspect.getsource(module)).body:
    if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING':
      for line in node.body:
        assert isinstance(line, ast.ImportFrom)
        (alias,) = line.names
        assert alias.name == alias.asname  # else it is not exported
        checked[alias.name] = line.module
  lazy = {'forward', 'logits'}
  if name == 'rotbits_jax':
    lazy = {*module.__all__}
  assert {*checked} == lazy
  for attribute, home in checked.items():
    expected = importlib.import_module(home)
    if hasattr(expected, attribute):
      assert getattr(module, attribute) is getattr(expected, attribute)
    else:
      assert getattr(module, attribute).__name__ == f'{home}.{attribute}'


def test_public_functions_say_what_each_parameter_is():
  for name in ('encode', 'encode_to_file', 'plan_shards', 'open', 'decode', 'load'):
    function = getattr(rotbits_jax, name)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
      assert f'\n  {parameter}: ' in text or f'\n  **{parameter}: ' in text, name
    assert '\nRaises:\n' in text


@pytest.mark.slow
@pytest.mark.daily
def test_mypy_checks_a_client(tmp_path):
  pytest.importorskip('mypy')
  client = tmp_path / 'client.py'
  client.write_text(CLIENT)
  command = [sys.executable, '-m', 'mypy', '--strict', '--follow-imports=silent']
  options = ['--ignore-missing-imports', f'--cache-dir={tmp_path / "cache"}', client]
  run = subprocess.run(
    [*command, *options],
    cwd=tmp_path,
    env=os.environ | {'MYPYPATH': str(PACKAGE.parent)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  lines = [int(x.split(':')[1]) for x in run.stdout.splitlines() if ': error: ' in x]
  count = CLIENT.count('\n')
  assert sorted({*lines}) == [*range(count - WRONG + 1, count + 1)], run.stdout
