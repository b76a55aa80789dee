"""Conversion of text to tokens with the tokenizer of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def read_tokenizer(files: Mapping[str, bytes]) -> Any:
  """Returns the tokenizer among a checkpoint's files, a `tokenizers.Tokenizer`.

  Raises:
    ValueError: if it is missing or cannot be read, or if the package `tokenizers` is
      not installed.
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
    return tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
  except Exception as error:  # the package raises nothing more specific
    raise ValueError(f'tokenizer.json cannot be read: {error}') from error


def encode_text(files: Mapping[str, bytes], text: str) -> np.ndarray:
  """Converts a text to tokens, int32 `[N]`, without special tokens or truncation.

  Raises:
    ValueError: if the text has no words, or if the tokenizer cannot encode it; see also
      `read_tokenizer`.
  """
  if not text.strip():
    raise ValueError('the text has no words')
  tokenizer = read_tokenizer(files)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  try:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)
  except Exception as error:  # the package raises nothing more specific
    raise ValueError(f'tokenizer.json cannot encode the text: {error}') from error
