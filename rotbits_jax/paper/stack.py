"""The message of the scheme, in memory: a stack of 16-bit words."""

import numpy as np


class WordStack:
  """A stack of 16-bit words; words are uint16 `[n]`, and the last one is on top."""

  def __init__(self, *arrays: np.ndarray):
    """Makes a stack of arrays of words, which are not copied; empty by default."""
    self._arrays = [*arrays]

  @property
  def size(self) -> int:
    return sum(words.size for words in self._arrays)

  def push(self, words: np.ndarray) -> None:
    self._arrays.append(words)

  def pop(self, count: int) -> np.ndarray:
    """Pops the top words; a ValueError if there are fewer."""
    if count > self.size:
      raise ValueError(f'the message ran dry: {count - self.size} words were missing')
    popped = [np.zeros(0, np.uint16)]
    while count > 0:
      words = self._arrays.pop()
      popped.append(words[-count:])
      if words.size > count:
        self._arrays.append(words[:-count])
      count -= words.size
    return np.concatenate(popped[::-1])
