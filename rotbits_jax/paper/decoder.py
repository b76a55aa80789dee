"""The decoder of the published scheme, which reads the message from its end."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.coding import coder
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import codes
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.paper import layout as layout_lib
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.paper import stack
from rotbits_jax.system import checksums
from rotbits_jax.system.progress import Progress

_CAUSE = 'the file is damaged, or this machine rounds beyond the margin of a correction'


def decode(
  options: layout_lib.Options,
  layout: layout_lib.MessageLayout,
  streams: Mapping[str, np.ndarray],
  config: models.ModelConfig,
  *,
  check: bool = True,
  progress: bool = False,
) -> segments.Arrays:
  """Decodes a model: the inverse of `encode`.

  Args:
    options: the options of the scheme.
    layout: the values that a decoder needs, maybe of an untrusted file.
    streams: uint16 `[n]` by name, see `layout.STREAMS`.
    config: the config of the model.
    check: whether to check the digests of the arrays.
    progress: whether to show a progress bar.

  Returns:
    The arrays, by path.

  Raises:
    ValueError: if streams, layout and config do not fit, or an array differs from the
      encoded one.
  """
  layout_lib.check(layout, options, config)
  decoder = _Decoder(options, layout, streams, config)
  count = len(decoder.shapes)
  order = reversed(range(count))
  for t in Progress('decode', count, 'segment', show=progress, units=order):
    decoder.pop_segment(t)
  decoder.pop_first()
  if check:
    for path, array in decoder.arrays.items():
      if checksums.of_array(array) != layout.arrays[path].digest:
        raise ValueError(f'{path}: decoded elements differ from the encoded; {_CAUSE}')
  return decoder.arrays


class _Decoder:
  """The state of one call of `decode`; its methods undo those of the encoder."""

  def __init__(
    self,
    options: layout_lib.Options,
    layout: layout_lib.MessageLayout,
    streams: Mapping[str, np.ndarray],
    config: models.ModelConfig,
  ):
    self.options = options
    self.layout = layout
    self.widths = config.segment_widths
    self.shapes = segments.shapes(config)
    self.lanes = layout_lib.lanes(self.widths)
    self.message, self.corrections = (
      stack.WordStack(streams[name]) for name in layout_lib.STREAMS
    )
    self.coders = list(layout.coders)  # those of streams that are still to be popped
    self.arrays: segments.Arrays = {}

  def pop_segment(self, t: int) -> None:
    """Pops the arrays of one segment, and pushes its rotation back."""
    shapes = self.shapes[t].all
    # The first columns of embeddings are popped last.
    others: segments.Shapes = {
      path: (rows, columns - self.layout.fixed)
      for path, (rows, columns) in _embeddings(shapes).items()
    }
    self.arrays |= self._pop(shapes | others)
    if self.layout.sampled[t]:
      self._push_rotation(t)

  def pop_first(self) -> None:
    """Pops the first columns of the embeddings, which the encoder pushed first."""
    embeddings = _embeddings(self.shapes[0].all)
    shapes: segments.Shapes = {
      path: (rows, self.layout.fixed) for path, (rows, _) in embeddings.items()
    }
    for path, columns in self._pop(shapes).items():
      self.arrays[path] = np.concatenate([columns, self.arrays[path]], axis=1)
    if self.message.size or self.corrections.size:
      raise ValueError('the streams hold more data than the model')

  def _push_rotation(self, t: int) -> None:
    """Recovers a rotation from the decoded arrays and pushes its integers back.

    The words from which the rotation was sampled come back with it.
    """
    frame = self.options.frame(self.widths, t, self.layout.fixed)
    code = self.options.code(frame)
    correction = self._pop_correction(code)
    recovered = rotations.recovered(
      frame, self.shapes[t], self.arrays, self.options.canonicalizer
    )
    left = rans.from_words(self.message.pop, self.lanes, code.max_rows(self.lanes))
    restored, _ = code.restore(left, recovered, correction)
    try:
      self.message.push(rans.unstacked(restored).reshape(-1))
    except ValueError as error:
      raise ValueError(f'segment {t}: {error}; {_CAUSE}') from error

  def _pop_correction(self, code: codes.RotationCode) -> correction_lib.Correction:
    """Pops the correction of a rotation."""
    base, extra, _, others = code.correction
    expected = [(x.dtype.name, x.shape) for x in (*others, base, extra)]
    coded = self._pop_coded(self.corrections, expected)
    return correction_lib.unpack(coded, self.corrections.pop, code.groups())

  def _pop(self, shapes: segments.Shapes) -> segments.Arrays:
    """Pops arrays that the encoder pushed together."""
    if self.options.entropy:
      expected = [
        (self.layout.arrays[path].dtype, shape) for path, shape in shapes.items()
      ]
      coded = self._pop_coded(self.message, expected)
      return dict(zip(shapes, coded, strict=True))
    popped = {}
    for path, shape in reversed(shapes.items()):
      stored = self.layout.arrays[path]
      words = self.message.pop(stored.num_words(shape))
      popped[path] = words.view(jnp.dtype(stored.dtype)).reshape(shape)
    return {path: popped[path] for path in shapes}

  def _pop_coded(self, words: stack.WordStack, expected: list[Any]) -> list[np.ndarray]:
    """Pops arrays of these dtypes and shapes that `coding.coder` encoded together."""
    spec = self.coders.pop()
    if [(array.dtype, array.shape) for array in spec.arrays] != expected:
      raise ValueError('a coder and the config list different arrays')
    data = words.pop(-(-spec.nbytes // 2)).view(np.uint8)[: spec.nbytes]
    return coder.decode(spec, data)


def _embeddings(shapes: segments.Shapes) -> segments.Shapes:
  """Returns the shapes of the embeddings."""
  return {path: x for path, x in shapes.items() if path.startswith('embed/')}
