"""Tiny checkpoints with a tokenizer, for tests that read text."""

import json
import pathlib

import numpy as np

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
VOCAB_SIZE = 69  # of the tiny checkpoints


def copy_with_tokenizer(name: str, directory: pathlib.Path) -> pathlib.Path:
  """Copies a tiny checkpoint and adds a tokenizer whose tokens are w0, w1, ..."""
  copy = directory / name
  copy.mkdir()
  for file in (TESTDATA / name).iterdir():
    (copy / file.name).write_bytes(file.read_bytes())
  vocabulary = {f'w{i}': i for i in range(VOCAB_SIZE)}
  tokenizer = {
    'version': '1.0',
    'added_tokens': [],
    'pre_tokenizer': {'type': 'WhitespaceSplit'},
    'model': {'type': 'WordLevel', 'vocab': vocabulary, 'unk_token': 'w0'},
  }
  (copy / 'tokenizer.json').write_text(json.dumps(tokenizer))
  return copy


def random_text(words: int) -> str:
  """A text of words that the tokenizer knows."""
  numbers = np.random.default_rng(0).integers(VOCAB_SIZE, size=words)
  return ' '.join(f'w{number}' for number in numbers)
