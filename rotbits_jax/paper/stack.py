"""The message of the scheme: a stack of 16-bit words.

Words from the top of the stack become a message by `rans.stacked`. Symbols are popped
from the message, and the words that are left of it, `rans.to_words`, go back onto the
stack.
"""

import numpy as np

LENGTH = 2
"""Words for the number of words in a block."""


class WordStack:
  """A stack of 16-bit words.

  Attributes:
    size: number of words.
  """

  def __init__(self, words: np.ndarray | None = None):
    """Makes a stack of words, uint16 `[W]`, bottom first; empty by default."""
    self._pieces: list[np.ndarray] = []
    self.size = 0
    if words is not None:
      self.push(words)

  def push(self, words: np.ndarray) -> None:
    """Pushes words, uint16 `[n]`; the last one is on top. The array is not copied."""
    if words.size:
      self._pieces.append(words)
      self.size += words.size

  def pop(self, count: int) -> np.ndarray:
    """Pops the top words, uint16 `[count]`, bottom first: the inverse of `push`.

    Raises:
      ValueError: if the stack has fewer words.
    """
    if not 0 <= count <= self.size:
      raise ValueError(f'the message ran dry: {count - self.size} words were missing')
    self.size -= count
    taken = [np.zeros(0, np.uint16)]
    while count:
      piece = self._pieces.pop()
      start = max(piece.size - count, 0)
      if start:
        self._pieces.append(piece[:start])
      taken.append(piece[start:])
      count -= piece.size - start
    return np.concatenate(taken[::-1])

  def push_block(self, words: np.ndarray) -> None:
    """Pushes words and then their number, so that `pop_block` needs no argument."""
    self.push(words)
    self.push(np.array([words.size & 0xFFFF, words.size >> 16], np.uint16))

  def pop_block(self) -> np.ndarray:
    """Pops the words of a block: the inverse of `push_block`; raises as `pop` does."""
    low, high = self.pop(LENGTH).tolist()
    return self.pop(low | high << 16)
