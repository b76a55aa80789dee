"""A stack of 16-bit words that may be far longer than memory.

Bits-back coding pops bits that were pushed long before, but few at once. Therefore the
encoder keeps the top of the stack in memory and writes the rest to a file. The decoder
reads the stack backwards from its end.

Words from the top of the stack become a message by `rans.stacked`. Symbols are popped
from the message, and the words that are left of it, `rans.to_words`, go back onto the
stack. Positions in the stack are Python integers.
"""

from collections.abc import Callable
import mmap

import numpy as np

Spill = Callable[[np.ndarray], None]

_PIECE = 1 << 23  # number of words that are spilled at once


class WordStack:
  """A stack of 16-bit words.

  Attributes:
    size: number of words that can be popped. Words that were spilled do not count.
  """

  def __init__(self, words: np.ndarray | None = None, spill: Spill | None = None):
    """Makes a stack.

    Args:
      words: uint16 `[W]`, the content, bottom first; empty by default. It is read once,
        from its end. Pages of a memory map are given back after they have been read.
      spill: takes the words that `settle` removes from the bottom.
    """
    self._below = np.zeros(0, np.uint16) if words is None else words
    self._left = self._below.size  # number of words of `_below` not yet popped
    self._above: list[np.ndarray] = []  # words that were pushed on top of `_below`
    self._spill = spill
    self.size = self._left
    # The caller has read all words to check them, so all pages are in memory.
    _give_back(self._below, 0)

  def push(self, words: np.ndarray) -> None:
    """Pushes words; the last one is on top.

    Args:
      words: uint16 `[n]`. The stack keeps the array and does not copy it.
    """
    if words.size:
      self._above.append(words)
      self.size += words.size

  def pop(self, count: int) -> np.ndarray:
    """Pops the top words: the inverse of `push`.

    Args:
      count: n.

    Returns:
      uint16 `[n]`, bottom first.

    Raises:
      ValueError: if the stack has fewer words.
    """
    if not 0 <= count <= self.size:
      raise ValueError(f'the message ran dry: {count - self.size} words were missing')
    self.size -= count
    taken: list[np.ndarray] = []
    while count and self._above:
      words = self._above.pop()
      if words.size > count:
        self._above.append(words[: words.size - count])
      taken.append(words[max(words.size - count, 0) :])
      count -= taken[-1].size
    if count or not taken:
      self._left -= count
      taken.append(np.array(self._below[self._left : self._left + count]))
      _give_back(self._below, self._left)
    return taken[0] if len(taken) == 1 else np.concatenate(taken[::-1])

  def push_block(self, words: np.ndarray) -> None:
    """Pushes words and then their number, so that `pop_block` needs no argument."""
    self.push(words)
    self.push(np.array([words.size & 0xFFFF, words.size >> 16], np.uint16))

  def pop_block(self) -> np.ndarray:
    """Pops the words of a block: the inverse of `push_block`.

    Raises:
      ValueError: if the stack has fewer words.
    """
    low, high = self.pop(2).tolist()
    return self.pop(low | high << 16)

  def settle(self, keep: int) -> None:
    """Spills all words but the top `keep`. Spilled words cannot be popped."""
    if self._spill is None:
      return
    while self.size > keep:
      words = self._above[0]
      count = min(words.size, self.size - keep, _PIECE)
      self._spill(words[:count])
      self.size -= count
      if count == words.size:
        del self._above[0]
      else:
        rest = words[count:]
        # The last piece is copied, so that the spilled words can be freed.
        self._above[0] = rest if self.size > keep else rest.copy()


def _give_back(words: np.ndarray, start: int) -> None:
  """Tells the system that pages of a read-only map are not needed any more.

  Args:
    words: the array; nothing happens if it is not a memory map.
    start: the first word whose page may be given back.
  """
  mapped = getattr(words, '_mmap', None)
  if mapped is None or getattr(words, 'mode', '') != 'r':
    return
  if hasattr(mmap, 'MADV_DONTNEED'):
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    offset = words.ctypes.data - base + words.itemsize * start
    page = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    if page < len(mapped):
      mapped.madvise(mmap.MADV_DONTNEED, page)
