"""The decoder of the published scheme.

It reads the message from its end, so it returns the arrays of the last segment first.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables as tables_lib
from rotbits_jax.coding import weights
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import word_stack
from rotbits_jax.paper import layout as layout_lib
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system.progress import track

_CAUSES = (
  'the file is damaged, or this machine recovers a rotation beyond the margin of its '
  'correction'
)


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
          f'{path}: decoded numbers differ from the encoded numbers: {_CAUSES}'
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
      tables_lib.from_bytes(tables.tobytes(), count, correction_lib.LEVELS)
    )
    self.coders = list(self.layout.coders)

  def arrays(self, progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters, those of the last segment first."""
    fixed = self.layout.fixed
    count = len(self.parts)
    order = range(count)[::-1]
    for t in track(order, 'decode', 'segment', total=count, show=progress):
      shapes = self.parts[t].all
      embeddings = {
        path: (shape[0], shape[1] - fixed)
        for path, shape in shapes.items()
        if path.startswith('embed/')
      }
      arrays = self._pop(shapes | embeddings)
      yield from ((path, x) for path, x in arrays.items() if path not in embeddings)
      if self.layout.sampled[t]:
        self._restore(t, arrays)
      if not t:
        first = self._pop({k: (shape[0], fixed) for k, shape in embeddings.items()})
        for path, array in first.items():
          yield path, np.concatenate([array, arrays[path]], axis=1)
    if self.stack.size or self.corrections.size or self.tables:
      raise ValueError('the streams hold more data than the model')

  def _pop(self, shapes: segments.Shapes) -> segments.Arrays:
    """Pops arrays that the encoder pushed together."""
    dtypes = {path: self.layout.arrays[path].dtype for path in shapes}
    if not self.layout.options.entropy:
      words = {
        path: self.stack.pop(layout_lib.num_words(dtypes[path], shapes[path]))
        for path in reversed(shapes)
      }
      return {
        path: words[path].view(jnp.dtype(dtypes[path])).reshape(shapes[path])
        for path in shapes
      }
    coder = self.coders.pop()
    found = [(array.dtype, array.shape) for array in coder.arrays]
    if found != [(dtypes[path], shape) for path, shape in shapes.items()]:
      raise ValueError('a coder and the config list different arrays')
    data = self.stack.pop(-(-coder.nbytes // 2)).view(np.uint8)[: coder.nbytes]
    return dict(zip(shapes, weights.decode(coder, data), strict=True))

  def _restore(self, t: int, arrays: segments.Arrays) -> None:
    """Recovers the rotation of a segment and puts its words back on the stack."""
    layout = self.layout
    shape = layout.frame(self.config, t)
    code = options_lib.code(shape, layout.options)
    table = np.stack([self.tables.pop() for _ in range(code.num_tables)][::-1])
    correction = code.unpack(self.corrections.pop_block(), table)
    recovered = rotations.recovered(
      shape, self.parts[t], arrays, layout.options.canonicaliser
    )
    left = rans.from_words(
      self.stack.pop_block(), layout.lanes, code.max_rows(layout.lanes)
    )
    message, _ = code.restore(left, recovered, correction)
    try:
      words = rans.unstacked(rans.check(message))
    except rans.MessageError as error:
      raise ValueError(f'segment {t}: {error}: {_CAUSES}') from error
    self.stack.push(words.reshape(-1))
