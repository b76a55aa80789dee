"""The encoder of the published scheme."""

from collections.abc import Iterable
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import rans
from rotbits_jax.coding import specs
from rotbits_jax.paper import decoder
from rotbits_jax.paper import layout as layout_lib
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.paper import stack
from rotbits_jax.system import checksums
from rotbits_jax.system.progress import Progress


class EncodedModel(NamedTuple):
  """An encoded model.

  Attributes:
    layout: the layout of the message.
    streams: uint16 `[n]` by name, see `decoder.STREAMS`.
    saving: the bytes that all rotations saved. It has a note for each segment: the
      popped bits, the bits of the correction, and the difference.
  """

  layout: layout_lib.MessageLayout
  streams: dict[str, np.ndarray]
  saving: passes.Saving


def refuse(source: passes.ModelSource) -> None:
  """Raises a ValueError if a model cannot be coded. It reads only shapes and dtypes."""
  if not source.config.sliced:
    raise ValueError(
      'a dense model has no shortcuts, so its segments cannot be rotated'
    )
  trees = map(source.specs, source.records)
  leaves = {path: x for tree in trees for path, x in structured.flatten(tree).items()}
  for segment in segments.shapes(source.config):
    for path, shape in segment.all.items():
      leaf = leaves.get(path)
      if leaf is None or structured.is_structured(leaf):
        raise ValueError(f'{path}: expected an array, got {type(leaf).__name__}')
      if np.dtype(leaf.dtype).name not in typing.get_args(layout_lib.Dtype):
        raise ValueError(f'{path}: expected floats of 16 or 32 bits, got {leaf.dtype}')
      if tuple(leaf.shape) != shape:
        raise ValueError(f'{path}: expected the shape {shape}, got {leaf.shape=}')


def encode(
  source: passes.ModelSource, options: options_lib.Options, *, progress: bool = False
) -> EncodedModel:
  """Encodes a sliced model by the published scheme.

  Args:
    source: the model.
    options: the options of the scheme.
    progress: whether to show the progress on stderr.

  Raises:
    ValueError: see `refuse`.
  """
  refuse(source)
  encoder = _Encoder(source, options)
  count = len(encoder.segments)
  for t in Progress('encode', count, 'segment', show=progress, units=range(count)):
    encoder.push(t)
  encoded = encoder.result()
  if options.exact:
    return encoded
  # Only decoding shows which errors a threshold leaves in the elements.
  decoded = decoder.decode(
    options, encoded.layout, encoded.streams, source.config, check=False
  )
  stored = {path: _stored(array) for path, array in decoded.items()}
  layout = layout_lib.MessageLayout(
    fixed=encoded.layout.fixed, sampled=encoded.layout.sampled, arrays=stored
  )
  return encoded._replace(layout=layout)


def _stored(array: np.ndarray) -> layout_lib.Stored:
  """Returns the dtype and the digest of an array."""
  dtype: Any = array.dtype.name
  return layout_lib.Stored(dtype=dtype, digest=checksums.of_array(array))


class _Sample(NamedTuple):
  """A rotation that was sampled and that the decoder can recover."""

  rotation: jax.Array
  arrays: segments.Arrays  # the rotated parameters
  left: np.ndarray  # words of the message that the rotation was popped from
  correction: np.ndarray  # words of the correction
  popped: int  # words that were popped

  @property
  def cost(self) -> int:
    """Words of the correction, as a block."""
    return self.correction.size + stack.LENGTH

  @property
  def net(self) -> int:
    """Words that the rotation saves."""
    return self.popped - (self.left.size + stack.LENGTH) - self.cost


class _Encoder:
  """The state of one call of `encode`."""

  def __init__(self, source: passes.ModelSource, options: options_lib.Options):
    self.options, self.widths = options, source.config.segment_widths
    self.segments = segments.read(source)
    self.message, self.corrections = stack.WordStack(), stack.WordStack()
    self.lanes = options_lib.lanes(self.widths)
    self.fixed = 0  # columns of the embeddings that are pushed first
    self.before: jax.Array | None = None  # the rotation of the previous segment
    self.coders: list[specs.StreamSpec] = []
    self.stored: dict[str, layout_lib.Stored] = {}
    self.sampled: list[bool] = []
    self.notes: list[dict[str, Any]] = []

  def result(self) -> EncodedModel:
    """Returns the encoded model, after all segments."""
    layout = layout_lib.MessageLayout(
      fixed=self.fixed,
      sampled=tuple(self.sampled),
      arrays=self.stored,
      coders=tuple(self.coders),
    )
    streams = zip(decoder.STREAMS, (self.message, self.corrections), strict=True)
    words = {name: words.pop(words.size) for name, words in streams}
    saved = sum(note.get('net', 0) for note in self.notes) // 8
    saving = passes.Saving('rotations', 0, saved, tuple(self.notes))
    return EncodedModel(layout, words, saving)

  def push(self, t: int) -> None:
    """Encodes one segment."""
    segment, frame = self.segments[t], self._frame(t)
    can_rotate = rotations.can_rotate(segment)
    neutral = None  # the canonical rotation of the readers
    if can_rotate and not frame.from_shortcut:
      kernels = segment.readers.values()
      neutral = rotations.reader_rotation(kernels, self.options.canonicalizer)
    first = {} if t else self._push_first(segment, neutral)
    sample = self._sample(t, segment, neutral) if can_rotate else None
    if sample is None:
      # The columns that `_push_first` pushed are already in canonical form.
      rotation = None if t else neutral
      arrays = rotations.rotated(segment, self.before, rotation)
    else:
      rotation, arrays = sample.rotation, sample.arrays
      self.message.push_block(sample.left)
      self.corrections.push_block(sample.correction)
    arrays = {path: arrays[path] for path in segment.all}
    others = {path: arrays[path][:, self.fixed :] for path in first}
    self._push((arrays | others).values())
    for path, columns in first.items():
      arrays[path] = np.concatenate([columns, others[path]], axis=1)
    self.stored |= {path: _stored(array) for path, array in arrays.items()}
    self.before = rotation
    self.sampled.append(sample is not None)
    self.notes.append(self._note(t, sample))

  def _note(self, t: int, sample: _Sample | None) -> dict[str, Any]:
    """Returns the note on a segment in the report."""
    width = self.widths[t]
    note: dict[str, Any] = {'segment': t, 'width': width, 'found in': None}
    if sample is None:
      return note
    return note | {
      'found in': 'shortcut' if self._frame(t).from_shortcut else 'readers',
      'popped': 16 * (sample.net + sample.cost),
      'correction': 16 * sample.cost,
      'net': 16 * sample.net,
      'of 16 d(d-1)/2': round(2 * sample.net / max(width * (width - 1), 1), 4),
    }

  def _frame(self, t: int) -> options_lib.Frame:
    """Returns the frame of a segment."""
    return self.options.frame(self.widths, t, self.fixed)

  def _push(self, arrays: Iterable[np.ndarray]) -> None:
    """Pushes arrays onto the message."""
    if self.options.entropy:
      encoded = coder.encode(list(arrays))
      self.coders.append(encoded.spec)
      arrays = [np.pad(encoded.data, (0, encoded.data.size % 2))]
    for array in arrays:
      self.message.push(np.ascontiguousarray(array).reshape(-1).view(np.uint16))

  def _push_first(
    self, segment: segments.SegmentParameters, neutral: jax.Array | None
  ) -> segments.Arrays:
    """Pushes and returns first columns of the embeddings: they pay for the rotation."""
    tables = {k: x for k, x in segment.writers.items() if k.startswith('embed/')}
    bits = min(8 * x.itemsize for x in tables.values())
    bits *= sum(x.shape[0] for x in tables.values())  # bits of a column
    bits *= 0.6 if self.options.entropy else 1.0  # about
    width = self.widths[0]
    needed = lambda n: 9 * n * (n + 1) + 64 * self.lanes
    enough = (f for f in range(width) if f * bits >= needed(width - f))
    self.fixed = next(enough, width)
    columns = None if neutral is None else neutral[:, : self.fixed]
    first = {
      k: rotations.rotate(x[:, : self.fixed] if columns is None else x, columns)
      for k, x in tables.items()
    }
    self._push(first.values())
    return first

  def _sample(
    self, t: int, segment: segments.SegmentParameters, neutral: jax.Array | None
  ) -> _Sample | None:
    """Samples a segment's rotation; None if that is impossible or saves nothing."""
    frame = self._frame(t)
    if not frame.n:
      return None
    code = self.options.code(frame)
    capacity = code.max_rows(self.lanes)
    rows = min(capacity, self.message.size // self.lanes)
    if not rows:
      return None
    words = self.message.pop(rows * self.lanes)
    message = rans.stacked(jnp.asarray(words.reshape(rows, -1)), capacity)
    message, latent, q = code.sample(message)
    sample = None
    if int(np.min(message.lowest)) >= 0:
      sample = self._recovered(segment, neutral, frame, latent, q, message, words.size)
    if sample is None or sample.net <= 0:
      self.message.push(words)
      return None
    return sample

  def _recovered(
    self,
    segment: segments.SegmentParameters,
    neutral: jax.Array | None,
    frame: options_lib.Frame,
    latent: Any,
    q: jax.Array,
    message: rans.Message,
    popped: int,
  ) -> _Sample | None:
    """Rotates a segment by the frame q; None if the decoder could not recover it."""
    code = self.options.code(frame)
    if frame.from_shortcut:
      (shortcut,) = segment.shortcut.values()
      before = self.before
      if before is None:
        before = jnp.eye(frame.k, dtype=jnp.float32)
      rotation = rotations.chained(shortcut, before, q)
    else:
      rotation = rotations.counter_rotated(neutral, q)
    arrays = rotations.rotated(segment, self.before, rotation)
    recovered, elsewhere = (
      rotations.recovered(
        frame, segment, arrays, self.options.canonicalizer, disturb=disturb
      )
      for disturb in (False, True)
    )
    correction = code.correct(recovered, latent, q, elsewhere)
    # The decoder's own steps on two machines, tried before anything is written.
    for matrix in (recovered, elsewhere) if self.options.exact else ():
      _, integers = code.restore(message, matrix, correction)
      same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), integers, latent)
      if not all(jax.tree.leaves(same)):
        return None
    left, packed = rans.to_words(message), code.pack(correction)
    return _Sample(rotation, arrays, left, packed, popped)
