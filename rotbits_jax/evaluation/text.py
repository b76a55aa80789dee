"""Conversion of text to tokens with the tokenizer of a checkpoint."""

from collections.abc import Iterator, Mapping
import contextlib
import os

import numpy as np


def encode_text(files: Mapping[str, bytes], text: str) -> np.ndarray:
  """Converts a text to tokens, int32 `[N]`, without special tokens or truncation.

  Among the files of the checkpoint, by name, must be its `tokenizer.json`.
  """
  if 'tokenizer.json' not in files:
    raise ValueError('the checkpoint has no tokenizer.json, which reading text needs')
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
      'reading text needs the package tokenizers: pip install "rotbits_jax[text]"'
    ) from error
  try:
    with _no_stderr():  # where a panic of Rust prints, and then raises no Exception
      tokenizer = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
      tokenizer.no_truncation()
      tokenizer.no_padding()
      ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    raise ValueError(f'tokenizer.json cannot be used: {error}') from error


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
  """Drops what is written to stderr by any code, not only Python's."""
  with open(os.devnull, 'wb') as nowhere, open(os.dup(2), 'wb') as stderr:
    os.dup2(nowhere.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(stderr.fileno(), 2)
