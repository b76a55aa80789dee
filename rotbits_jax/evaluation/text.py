"""Text to tokens, by the tokenizer that lies beside a checkpoint."""

from collections.abc import Mapping

import numpy as np


def encode_text(files: Mapping[str, bytes], text: str) -> np.ndarray:
  """Tokens of a text, with no special tokens added and nothing cut off.

  Args:
    files: the checkpoint's sidecar files by name, `tokenizer.json` among them.
    text: at least one word.

  Returns:
    `[N]` int32.

  Raises:
    ValueError: if the text has no words, or if the tokenizer is missing or broken.
  """
  if not text.strip():
    raise ValueError('the text has no words')
  if 'tokenizer.json' not in files:
    raise ValueError('the checkpoint has no tokenizer.json to read the text with')
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
      'reading text takes the package tokenizers: pip install "rotbits_jax[text]"'
    ) from error
  try:
    tokenizer = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
  except Exception as error:  # the package raises nothing more specific
    raise ValueError(f'tokenizer.json cannot be read: {error}') from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
