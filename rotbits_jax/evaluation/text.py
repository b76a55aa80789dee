"""Text to tokens, by the tokenizer that lies beside a checkpoint."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def read_tokenizer(files: Mapping[str, bytes]) -> Any:
  """The tokenizer of a checkpoint, a `tokenizers.Tokenizer`.

  Args:
    files: the checkpoint's sidecar files by name, `tokenizer.json` among them.

  Raises:
    ValueError: if the tokenizer, or the package that reads it, is missing or broken.
  """
  if 'tokenizer.json' not in files:
    raise ValueError('the checkpoint has no tokenizer.json to read the text with')
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
      'reading text takes the package tokenizers: pip install "rotbits_jax[text]"'
    ) from error
  try:
    return tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
  except Exception as error:  # the package raises nothing more specific
    raise ValueError(f'tokenizer.json cannot be read: {error}') from error


def encode_text(files: Mapping[str, bytes], text: str) -> np.ndarray:
  """Tokens of a text, with no special tokens added and nothing cut off.

  Args:
    files: see `read_tokenizer`.
    text: at least one word.

  Returns:
    `[N]` int32.

  Raises:
    ValueError: if the text has no words, or as for `read_tokenizer`.
  """
  if not text.strip():
    raise ValueError('the text has no words')
  tokenizer = read_tokenizer(files)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
