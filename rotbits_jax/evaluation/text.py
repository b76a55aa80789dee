"""Conversion of text to tokens with the tokenizer of a checkpoint."""

from collections.abc import Mapping

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
    tokenizer = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # its Rust raises what is no Exception
    raise ValueError(f'tokenizer.json cannot be used: {error}') from error
