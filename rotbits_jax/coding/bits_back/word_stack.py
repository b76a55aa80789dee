"""A stack of words that may be far longer than memory, and a window over its top.

Bits-back coding pops bits that were pushed long before, but few at once: sampling a
rotation needs the words of one rotation. Therefore most of a message is a plain stack
of 16-bit words. The encoder keeps the top of the stack in memory and writes the rest to
a file. The decoder reads the stack backwards from its end. To push words without
entropy coding is to append them. rANS does the same with uniform 16-bit symbols: a lane
whose state is `high << 16 | low` moves `low` to its stack and puts the symbol in its
place.

Symbols with other probabilities need a `rans.Message`. It is a small *window* over the
stack. `refill` moves words from the top of the stack to the bottom of the window's
lanes, in full rows. `drain` moves them back and is the exact inverse.

Positions in the stack are Python integers. Shape letters: N lanes, R rows.
"""

from collections.abc import Callable
import mmap

import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans

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


def refill(
  window: rans.Message | None, stack: WordStack, rows: int, lanes: int, capacity: int
) -> rans.Message:
  """Moves rows from the top of a stack to the bottom of a window.

  Args:
    window: the message; None to make a new one, whose states take one more row.
    stack: the words; changed in place.
    rows: R.
    lanes: N.
    capacity: capacity of the window, in words per lane.

  Returns:
    The window. Its `lowest` and `highest` are set to the new sizes.

  Raises:
    ValueError: if the stack has fewer words, or if the window has no room for them.
  """
  deepest = 0 if window is None else int(np.max(window.size, initial=0))
  if deepest + rows > capacity:
    raise ValueError(f'a window of {capacity} rows has no room for {rows} more')
  if window is None:
    words = stack.pop((rows + 1) * lanes).reshape(-1, lanes)
    return rans.stacked(jnp.asarray(words), capacity)
  words = stack.pop(rows * lanes).reshape(-1, lanes)
  # The rows that are cut off at the end are above the stacks of all lanes.
  stacks = np.concatenate([words, np.asarray(window.words)[: capacity + 1 - rows]])
  return _renewed(window, stacks, np.asarray(window.size) + rows)


def drain(
  window: rans.Message, stack: WordStack, rows: int, *, last: bool
) -> rans.Message:
  """Moves rows from the bottom of a window to a stack: the inverse of `refill`.

  Args:
    window: the message.
    stack: the words; changed in place.
    rows: R.
    last: whether `refill` made a new window from these rows. If so, the payload of the
      states is moved, too.

  Returns:
    The window without the rows. Its `lowest` and `highest` are set to the new sizes.

  Raises:
    ValueError: if a lane has fewer than R words, or if `last` is set and the window
      holds anything but the rows and the payload.
  """
  size = np.asarray(window.size)
  fits = (size == rows).all() if last else (size >= rows).all()
  if not fits or (last and (np.asarray(window.state) >> 16 != 1).any()):
    raise ValueError('the window over the message does not hold the words put there')
  words = np.asarray(window.words)
  stack.push(words[:rows].reshape(-1))
  if last:
    stack.push(np.asarray(rans.payload(window)))
  rest = np.concatenate([words[rows:], np.zeros_like(words[:rows])])
  return _renewed(window, rest, size - rows)


def _renewed(window: rans.Message, words: np.ndarray, size: np.ndarray) -> rans.Message:
  """Returns a message with these stacks, `lowest` and `highest` being the new sizes."""
  sizes = jnp.asarray(size, jnp.int32)
  return rans.Message(window.state, jnp.asarray(words), sizes, sizes, sizes)
