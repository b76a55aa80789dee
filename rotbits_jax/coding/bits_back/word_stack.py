"""A stack of words that may be far longer than memory, and a message on top of it.

Bits-back coding pops bits that were pushed long before, but never many at once: to
sample a rotation takes the words of one rotation. So the bulk of a message is a plain
stack of 16-bit words, of which the encoder holds the top and writes the rest away, and
which the decoder reads from its end backwards. Pushing words that are taken as they are
is an append. It is also what rANS itself does with uniform 16-bit symbols: a lane whose
state is `high << 16 | low` moves `low` to its stack and takes the symbol in its place.

Symbols with other probabilities need a `rans.Message`. It is a small *window* over the
stack: `refill` moves words from the top of the stack to the bottom of the window's
lanes, as full rows, and `drain` moves them back. Both are exact inverses.

Positions in the stack are Python integers. Shape letters: N lanes, R rows.
"""

from collections.abc import Callable
import mmap

import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans

Spill = Callable[[np.ndarray], None]

_PIECE = 1 << 23  # words that are spilled at once


class WordStack:
  """A stack of 16-bit words.

  Attributes:
    size: how many words can be popped: the decoder's whole stack, or what the encoder
      still holds.
  """

  def __init__(self, words: np.ndarray | None = None, spill: Spill | None = None):
    """Makes a stack.

    Args:
      words: uint16 `[W]`, the content, bottom first; empty by default. It is read from
        its end, once. Pages of a memory map are given back when they have been read.
      spill: takes words that `settle` removes from the bottom.
    """
    self._below = np.zeros(0, np.uint16) if words is None else words
    self._left = self._below.size  # words of `_below` that have not been popped
    self._above: list[np.ndarray] = []  # on top of these
    self._spill = spill
    self.size = self._left
    _give_back(self._below, 0)  # whoever checked the words read them all

  def push(self, words: np.ndarray) -> None:
    """Puts words on top, the last one topmost.

    Args:
      words: uint16 `[n]`; kept, not copied.
    """
    if words.size:
      self._above.append(words)
      self.size += words.size

  def pop(self, count: int) -> np.ndarray:
    """Takes the top words: the inverse of `push`.

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
    """Pushes words and, on top, how many there are."""
    self.push(words)
    self.push(np.array([words.size & 0xFFFF, words.size >> 16], np.uint16))

  def pop_block(self) -> np.ndarray:
    """The inverse of `push_block`.

    Raises:
      ValueError: if the stack has fewer words.
    """
    low, high = self.pop(2).tolist()
    return self.pop(low | high << 16)

  def settle(self, keep: int) -> None:
    """Spills all but the top `keep` words for good."""
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
        # A copy in the end, so that what was spilled need not be held.
        self._above[0] = rest if self.size > keep else rest.copy()


def _give_back(words: np.ndarray, start: int) -> None:
  """Tells the system that a read-only map's pages from `start` on are not needed."""
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
    window: the message; None for a new one, whose states take a row more.
    stack: the words; changed in place.
    rows: R.
    lanes: N.
    capacity: of the window, in words of a lane.

  Returns:
    The window. Its `lowest` and `highest` begin anew.

  Raises:
    ValueError: if the stack has fewer words, or the window no room.
  """
  deepest = 0 if window is None else int(np.max(window.size, initial=0))
  if deepest + rows > capacity:
    raise ValueError(f'{rows} rows more do not fit a window of {capacity}')
  if window is None:
    words = stack.pop((rows + 1) * lanes).reshape(-1, lanes)
    return rans.stacked(jnp.asarray(words), capacity)
  words = stack.pop(rows * lanes).reshape(-1, lanes)
  # Rows that no lane reaches are cut off.
  stacks = np.concatenate([words, np.asarray(window.words)[: capacity + 1 - rows]])
  return _renewed(window, stacks, np.asarray(window.size) + rows)


def drain(
  window: rans.Message, stack: WordStack, rows: int, *, last: bool
) -> rans.Message:
  """The inverse of `refill`.

  Args:
    window: the message.
    stack: the words; changed in place.
    rows: R.
    last: whether `refill` made the window of these rows.

  Returns:
    The window without them.

  Raises:
    ValueError: if not all lanes have so many words, or the window is `last` and has
      something else.
  """
  size = np.asarray(window.size)
  fits = (size == rows).all() if last else (size >= rows).all()
  if not fits or (last and (np.asarray(window.state) >> 16 != 1).any()):
    raise ValueError('the window over the message does not hold what was put there')
  words = np.asarray(window.words)
  stack.push(words[:rows].reshape(-1))
  if last:
    stack.push(np.asarray(rans.payload(window)))
  rest = np.concatenate([words[rows:], np.zeros_like(words[:rows])])
  return _renewed(window, rest, size - rows)


def _renewed(window: rans.Message, words: np.ndarray, size: np.ndarray) -> rans.Message:
  """A message with these stacks, whose record of sizes begins anew."""
  sizes = jnp.asarray(size, jnp.int32)
  return rans.Message(window.state, jnp.asarray(words), sizes, sizes, sizes)
