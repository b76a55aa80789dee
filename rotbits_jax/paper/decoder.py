"""The decoder of the published scheme.

It reads the message from its end, so it returns the arrays of the last segment first.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables as tables_lib
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import numbers
from rotbits_jax.coding.bits_back import word_stack
from rotbits_jax.paper import layout as layout_lib
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system.progress import track


def decode(
  layout: dict[str, Any],
  message: np.ndarray,
  corrections: np.ndarray,
  tables: np.ndarray,
  config: models.ModelConfig,
  *,
  progress: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
  """Decodes a model: the inverse of `encode`.

  The layout and the sizes of the streams are checked at once, the arrays when the
  iterator reaches them.

  Args:
    layout: the JSON values of `Encoded.layout`. They may come from an untrusted file.
    message: uint16, the words that `encode` spilled. It may be a memory map; it is read
      from its end, and its pages are given back.
    corrections: as in `Encoded`.
    tables: as in `Encoded`.
    config: config of the model.
    progress: whether to show the progress on stderr.

  Returns:
    An iterator over the parameters as pairs (path, array), those of the last segment
    first. It holds the parameters of one segment at a time.

  Raises:
    ValueError: if the streams do not fit the layout, if the layout does not fit the
      config, or if an array differs from the encoded one.
  """
  run = _Decoder(layout, message, corrections, tables, config)

  def checked() -> Iterator[tuple[str, np.ndarray]]:
    for path, array in run.arrays(progress):
      if checksums_lib.of_array(array) != run.layout.arrays[path].digest:
        raise ValueError(
          f'{path}: decoded numbers differ from the encoded numbers: the file is '
          'damaged, or this machine recovers a rotation beyond the margin of its '
          'correction'
        )
      yield path, array

  return checked()


def decode_unchecked(
  layout: dict[str, Any],
  message: np.ndarray,
  corrections: np.ndarray,
  tables: np.ndarray,
  config: models.ModelConfig,
) -> Iterator[tuple[str, np.ndarray]]:
  """Decodes a model without checking the digests of its arrays; see `decode`."""
  return _Decoder(layout, message, corrections, tables, config).arrays(progress=False)


class _Decoder:
  """The state of one call of `decode`."""

  def __init__(
    self,
    layout: dict[str, Any],
    message: np.ndarray,
    corrections: np.ndarray,
    tables: np.ndarray,
    config: models.ModelConfig,
  ):
    for name, stream, dtype in (
      ('message', message, np.uint16),
      ('corrections', corrections, np.uint16),
      ('tables', tables, np.uint8),
    ):
      if stream.dtype != dtype or stream.ndim != 1:
        raise ValueError(f'{name} must be a vector of {np.dtype(dtype)}')
    self.config = config
    self.layout = layout_lib.from_json(layout, config, message.size)
    self.parts = segments.parts(config)
    self.stack = word_stack.WordStack(message)
    self.corrections = word_stack.WordStack(corrections)
    count = self.layout.num_tables(config)
    self.tables = list(
      tables_lib.from_bytes(tables.tobytes(), count, layout_lib.ALPHABET)
    )
    self.window: rans.Message | None = None
    if self.layout.window:
      options, lanes = self.layout.options, self.layout.lanes
      capacity = options_lib.capacity(config.segment_widths, lanes, options)
      words = self.stack.pop(self.layout.window)
      self.window = rans.from_words(words, lanes, capacity)

  def arrays(self, progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters, those of the last segment first."""
    fixed = self.layout.fixed
    sampled = [t for t, rows in enumerate(self.layout.rows) if rows is not None]
    count = len(self.parts)
    order = range(count)[::-1]
    for t in track(order, 'decode', 'segment', total=count, show=progress):
      part = self.parts[t]
      table = self._correction_table(t) if t in sampled else None
      arrays: segments.Arrays = {}
      for path, shape in reversed(part.all.items()):
        shape = (shape[0], shape[1] - fixed) if path.startswith('embed/') else shape
        arrays[path] = self._pop(path, shape)
        if not path.startswith('embed/'):
          yield path, arrays[path]
      if table is not None:
        self._restore(t, arrays, table, last=t == sampled[0])
      if t:
        continue
      for path, array in arrays.items():
        if path.startswith('embed/'):
          first = self._pop(path, (array.shape[0], fixed))
          yield path, np.concatenate([first, array], axis=1)
    if self.stack.size or self.corrections.size or self.tables:
      raise ValueError('the streams hold more data than the model')

  def _pop(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype, entropy = self.layout.arrays[path].dtype, self.layout.options.entropy
    table = self.tables.pop() if entropy else None
    return numbers.pop(self.stack, dtype, shape, table)

  def _correction_table(self, t: int) -> np.ndarray:
    shape = self.layout.frame(self.config, t)
    count = options_lib.code(shape, self.layout.options).num_tables
    rows = np.stack([self.tables.pop() for _ in range(count)][::-1])
    if rows[:, correction_lib.LEVELS :].any():
      raise ValueError('a correction has levels that do not exist')
    return rows[:, : correction_lib.LEVELS]

  def _restore(
    self, t: int, arrays: segments.Arrays, table: np.ndarray, *, last: bool
  ) -> None:
    """Recovers the rotation of a segment and pushes it back onto the message."""
    if self.window is None:
      raise ValueError('the message has no window onto which to push a rotation')
    shape = self.layout.frame(self.config, t)
    code = options_lib.code(shape, self.layout.options)
    correction = code.unpack(self.corrections.pop_block(), table)
    recovered = rotations.recovered(
      shape, self.parts[t], arrays, self.layout.options.canonicaliser
    )
    window, _ = code.restore(self.window, recovered, correction)
    rows = self.layout.rows[t]
    self.window = word_stack.drain(rans.check(window), self.stack, rows or 0, last=last)
