"""The decoder of the published scheme, which reads the message from its end."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.coding import coder
from rotbits_jax.coding import rans
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
  layout: layout_lib.MessageLayout,  # which may come from an untrusted file
  streams: Mapping[str, np.ndarray],  # uint16 [n] by name, see `layout.STREAMS`
  config: models.ModelConfig,
  *,
  check: bool = True,  # whether to check the digests of the arrays
  progress: bool = False,
) -> segments.Arrays:
  """Decodes a model, by path: the inverse of `encode`.

  A ValueError says that streams, layout and config do not fit, or that an array differs
  from the encoded one.
  """
  layout_lib.check(layout, options, config)
  message, corrections = (stack.WordStack(streams[x]) for x in layout_lib.STREAMS)
  stream_specs, segment_shapes = list(layout.coders), segments.shapes(config)
  widths, lanes = config.segment_widths, layout_lib.lanes(config.segment_widths)

  def pop_coded(words: stack.WordStack, expected: list[Any]) -> list[np.ndarray]:
    """Pops arrays of these dtypes and shapes that `coding.coder` encoded together."""
    spec = stream_specs.pop()
    if [(array.dtype, array.shape) for array in spec.arrays] != expected:
      raise ValueError('a coder and the config list different arrays')
    data = words.pop(-(-spec.nbytes // 2)).view(np.uint8)[: spec.nbytes]
    return coder.decode(spec, data)

  def pop(shapes: segments.Shapes) -> segments.Arrays:
    """Pops arrays that the encoder pushed together."""
    if options.entropy:
      dtypes = (layout.arrays[path].dtype for path in shapes)
      coded = pop_coded(message, [*zip(dtypes, shapes.values(), strict=True)])
      return dict(zip(shapes, coded, strict=True))
    popped = {}
    for path, shape in reversed(shapes.items()):
      stored = layout.arrays[path]
      words = message.pop(stored.num_words(shape))
      popped[path] = words.view(jnp.dtype(stored.dtype)).reshape(shape)
    return {path: popped[path] for path in shapes}

  arrays: segments.Arrays = {}
  embeddings: segments.Shapes = {}
  count = len(segment_shapes)
  order = reversed(range(count))
  for t in Progress('decode', count, 'segment', show=progress, units=order):
    shapes = segment_shapes[t].all
    embeddings = {k: shape for k, shape in shapes.items() if k.startswith('embed/')}
    others = {k: (rows, n - layout.fixed) for k, (rows, n) in embeddings.items()}
    arrays |= pop(shapes | others)
    if layout.sampled[t]:
      # The words from which the rotation was sampled come back with it.
      frame = options.frame(widths, t, layout.fixed)
      code = options.code(frame)
      base, extra, _, beside = code.correction
      expected = [(x.dtype.name, x.shape) for x in (*beside, base, extra)]
      coded = pop_coded(corrections, expected)
      correction = correction_lib.unpack(coded, corrections.pop, code.groups())
      recovered = rotations.recovered(
        frame, segment_shapes[t], arrays, options.canonicalizer
      )
      left = rans.from_words(message.pop, lanes, code.max_rows(lanes))
      restored, _ = code.restore(left, recovered, correction)
      try:
        message.push(rans.unstacked(restored).reshape(-1))
      except ValueError as error:
        raise ValueError(f'segment {t}: {error}; {_CAUSE}') from error
  first = pop({k: (rows, layout.fixed) for k, (rows, _) in embeddings.items()})
  for path, columns in first.items():
    arrays[path] = np.concatenate([columns, arrays[path]], axis=1)
  if message.size or corrections.size:
    raise ValueError('the streams hold more data than the model')
  for path, array in arrays.items() if check else ():
    if checksums.of_array(array) != layout.arrays[path].digest:
      raise ValueError(f'{path}: decoded elements differ from the encoded; {_CAUSE}')
  return arrays
