"""The decoder of the published scheme.

It reads the message from its end, so it returns the arrays of the last segment first.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.coding import rans
from rotbits_jax.coding import weights
from rotbits_jax.coding.bits_back import word_stack
from rotbits_jax.paper import frames
from rotbits_jax.paper import layout as layout_lib
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system.progress import track

STREAMS = ('message', 'corrections')

_CAUSE = (
  'the file is damaged, or this machine recovers a rotation beyond the margin of its '
  'correction'
)


def decode(
  options: options_lib.Options,
  layout: Any,
  streams: Mapping[str, np.ndarray],
  config: models.ModelConfig,
  *,
  check: bool = True,
  progress: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
  """Decodes a model: the inverse of `encode`.

  The layout and the sizes of the streams are checked at once, the arrays when the
  iterator reaches them.

  Args:
    options: the options with which the model was encoded.
    layout: the JSON values of `EncodedModel.layout`. They may come from an untrusted
      file.
    streams: uint16 `[n]`: `message`, the words that `encode` spilled, and the streams
      of `EncodedModel`. A stream may be a memory map; it is read from its end, and its
      pages are given back.
    config: config of the model.
    check: whether to check the digest of each array.
    progress: whether to show the progress on stderr.

  Returns:
    An iterator over the parameters as pairs (path, array), those of the last segment
    first. It holds the parameters of one segment at a time.

  Raises:
    ValueError: if the streams do not fit the layout, if the layout does not fit the
      config, or if an array differs from the encoded one.
  """
  for name in STREAMS:
    if streams[name].dtype != np.uint16 or streams[name].ndim != 1:
      raise ValueError(f'{name} must be a vector of uint16')
  own = layout_lib.load(layout, options, config, streams['message'].size)
  decoded = _decode(options, own, streams, config, progress)

  def checked() -> Iterator[tuple[str, np.ndarray]]:
    for path, array in decoded:
      if check and checksums_lib.of_array(array) != own.arrays[path].digest:
        raise ValueError(f'{path}: decoded elements differ from the encoded; {_CAUSE}')
      yield path, array

  return checked()


def _decode(
  options: options_lib.Options,
  layout: layout_lib.MessageLayout,
  streams: Mapping[str, np.ndarray],
  config: models.ModelConfig,
  progress: bool,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the parameters, those of the last segment first."""
  stack, corrections = (word_stack.WordStack(streams[name]) for name in STREAMS)
  coders, parts = list(layout.coders), segments.parts(config)
  widths, lanes = config.segment_widths, frames.lanes(config.segment_widths)

  def pop(shapes: segments.Shapes) -> segments.Arrays:
    """Pops arrays that the encoder pushed together."""
    if options.entropy:
      coder = coders.pop()
      found = [(array.dtype, array.shape) for array in coder.arrays]
      if found != [(layout.arrays[path].dtype, x) for path, x in shapes.items()]:
        raise ValueError('a coder and the config list different arrays')
      data = stack.pop(-(-coder.nbytes // 2)).view(np.uint8)[: coder.nbytes]
      return dict(zip(shapes, weights.decode(coder, data), strict=True))
    words = {
      path: stack.pop(layout.arrays[path].num_words(shape))
      for path, shape in reversed(shapes.items())
    }
    return {
      path: words[path].view(jnp.dtype(layout.arrays[path].dtype)).reshape(shape)
      for path, shape in shapes.items()
    }

  order = range(len(parts))[::-1]
  for t in track(order, 'decode', 'segment', total=len(parts), show=progress):
    shapes = parts[t].all
    embeddings = {
      path: (shape[0], shape[1] - layout.fixed)
      for path, shape in shapes.items()
      if path.startswith('embed/')
    }
    arrays = pop(shapes | embeddings)
    yield from ((path, x) for path, x in arrays.items() if path not in embeddings)
    if layout.sampled[t]:
      # The words from which the rotation was sampled come back with it.
      shape = frames.frame(widths, t, layout.fixed, options)
      code = frames.code(shape, options)
      correction = code.unpack(corrections.pop_block())
      recovered = rotations.recovered(shape, parts[t], arrays, options.canonicalizer)
      left = rans.from_words(stack.pop_block(), lanes, code.max_rows(lanes))
      message, _ = code.restore(left, recovered, correction)
      try:
        stack.push(rans.unstacked(rans.check(message)).reshape(-1))
      except rans.MessageError as error:
        raise ValueError(f'segment {t}: {error}; {_CAUSE}') from error
  first = pop({path: (shape[0], layout.fixed) for path, shape in embeddings.items()})
  for path, array in first.items():
    yield path, np.concatenate([array, arrays[path]], axis=1)
  if stack.size or corrections.size:
    raise ValueError('the streams hold more data than the model')
