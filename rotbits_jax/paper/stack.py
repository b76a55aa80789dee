"""The message of the scheme, in memory: a stack of 16-bit words."""

import numpy as np

LENGTH = 2
"""Words for the number of words in a block."""


class WordStack:
  """A stack of 16-bit words; words are uint16 `[n]`, and the last one is on top."""

  def __init__(self, words: np.ndarray | None = None):
    """Makes a stack of words; empty by default."""
    self._arrays: list[np.ndarray] = []
    self.size = 0
    if words is not None:
      self.push(words)

  def push(self, words: np.ndarray) -> None:
    """Pushes words, which are not copied."""
    if words.size:
      self._arrays.append(words)
      self.size += words.size

  def pop(self, count: int) -> np.ndarray:
    """Pops the top words; a ValueError if there are fewer."""
    if not 0 <= count <= self.size:
      raise ValueError(f'the message ran dry: {count - self.size} words were missing')
    self.size -= count
    popped = [np.zeros(0, np.uint16)]
    while count:
      words = self._arrays.pop()
      start = max(words.size - count, 0)
      if start:
        self._arrays.append(words[:start])
      popped.append(words[start:])
      count -= words.size - start
    return np.concatenate(popped[::-1])

  def push_block(self, words: np.ndarray) -> None:
    """Pushes words and then their number, so that `pop_block` needs no argument."""
    self.push(words)
    self.push(np.array([words.size & 0xFFFF, words.size >> 16], np.uint16))

  def pop_block(self) -> np.ndarray:
    """Pops the words of a block: the inverse of `push_block`; raises as `pop` does."""
    low, high = self.pop(LENGTH).tolist()
    return self.pop(low | high << 16)
