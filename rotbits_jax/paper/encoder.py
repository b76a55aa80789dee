"""The encoder of the published scheme."""

from collections.abc import Iterable
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import rans
from rotbits_jax.coding import specs
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.paper import decoder
from rotbits_jax.paper import layout as layout_lib
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.paper import stack
from rotbits_jax.system import checksums
from rotbits_jax.system.progress import Progress


class EncodedModel(NamedTuple):
  """An encoded model."""

  layout: layout_lib.MessageLayout
  streams: dict[str, np.ndarray]  # uint16 [n] by name, see `layout.STREAMS`
  saving: passes.Saving  # of all rotations, with a note for each segment


class _Rotated(NamedTuple):
  """The parameters around a segment, rotated."""

  rotation: jax.Array | None  # T, float32 [d, d]; None for the identity
  arrays: segments.Arrays
  note: dict[str, Any]  # what sampling saves; empty if T was not sampled


def refuse(source: passes.Source) -> None:
  """Raises a ValueError if a model cannot be coded. It reads only shapes and dtypes."""
  if not source.config.sliced:
    raise ValueError("the preset 'paper' needs a sliced checkpoint, got a dense one")
  trees = map(source.specs, source.records)
  leaves = {path: x for tree in trees for path, x in structured.flatten(tree).items()}
  for path, shape in segments.all_shapes(source.config).items():
    leaf: Any = leaves.get(path)
    if structured.is_structured(leaf) or getattr(leaf, 'shape', None) != shape:
      raise ValueError(f'{path}: expected an array of the shape {shape}')
    if np.dtype(leaf.dtype).name not in typing.get_args(layout_lib.Dtype):
      raise ValueError(f'{path}: expected floats of 16 or 32 bits, got {leaf.dtype}')


def encode(
  source: passes.Source, options: layout_lib.Options, *, progress: bool = False
) -> EncodedModel:
  """Encodes a sliced model, which `refuse` has accepted, by the published scheme."""
  encoder = _Encoder(source, options)
  count = len(encoder.segments)
  for t in Progress('encode', count, 'segment', show=progress, units=range(count)):
    encoder.push(t)
  stacks = zip(layout_lib.STREAMS, (encoder.message, encoder.corrections), strict=True)
  streams = {name: words.pop(words.size) for name, words in stacks}
  layout = layout_lib.MessageLayout(
    fixed=encoder.fixed,
    sampled=tuple('net' in note for note in encoder.notes),
    arrays=encoder.stored,
    coders=tuple(encoder.coders),
  )
  if not options.exact:
    # Only decoding shows which errors a threshold leaves in the elements.
    decoded = decoder.decode(options, layout, streams, source.config, check=False)
    layout = msgspec.structs.replace(layout, arrays=_stored(decoded))
  saved = sum(note.get('net', 0) for note in encoder.notes) // 8
  saving = passes.Saving('rotations', 0, saved, tuple(encoder.notes))
  return EncodedModel(layout, streams, saving)


def _stored(arrays: segments.Arrays) -> dict[str, layout_lib.Stored]:
  """Returns the dtypes and the digests of arrays."""
  stored = {}
  for path, array in arrays.items():
    dtype: Any = array.dtype.name
    stored[path] = layout_lib.Stored(dtype=dtype, digest=checksums.of_array(array))
  return stored


def _coded(arrays: Iterable[np.ndarray]) -> tuple[specs.StreamSpec, np.ndarray]:
  """Encodes arrays; returns the spec of their stream and the stream as words."""
  encoded = coder.encode([*arrays])
  return encoded.spec, np.pad(encoded.data, (0, encoded.data.size % 2)).view(np.uint16)


class _Encoder:
  """The state of one call of `encode`."""

  def __init__(self, source: passes.Source, options: layout_lib.Options):
    self.options = options
    self.widths = source.config.segment_widths
    self.segments = segments.read(source)
    self.message = stack.WordStack()
    self.corrections = stack.WordStack()
    self.lanes = layout_lib.lanes(self.widths)
    self.fixed = 0  # columns of the embeddings that are pushed first
    self.before: jax.Array | None = None  # the rotation of the previous segment
    self.coders: list[specs.StreamSpec] = []
    self.stored: dict[str, layout_lib.Stored] = {}
    self.notes: list[dict[str, Any]] = []

  def push(self, t: int) -> None:
    """Encodes one segment by bits-back coding, see `paper`.

    It pops the rotation of the segment from the message, rotates the parameters around
    the segment, and pushes these. The decoder recovers the rotation from them and
    pushes it back, so it costs no bits; compare `coding.codecs.bits_back`.
    """
    segment = self.segments[t]
    can_rotate = self._can_rotate(t)
    neutral = self._reader_rotation(t) if can_rotate else None
    first = self._push_first(segment, neutral) if t == 0 else {}
    frame = self.options.frame(self.widths, t, self.fixed)
    rotated = None
    if can_rotate and frame.n:
      rotated = self._pop_rotation(segment, frame, neutral)
    if rotated is None:
      # The columns that `_push_first` pushed are already in canonical form.
      rotation = neutral if t == 0 else None
      arrays = rotations.rotated(segment, self.before, rotation)
      rotated = _Rotated(rotation, arrays, {})
    self.before = rotated.rotation
    self._push_segment({path: rotated.arrays[path] for path in segment.all}, first)
    note = {'segment': t, 'width': self.widths[t], 'found in': None}
    self.notes.append(note | rotated.note)

  def _can_rotate(self, t: int) -> bool:
    """Whether rotated elements stay within the range of their dtypes."""
    is_last = t + 1 == len(self.segments)
    leaving = {} if is_last else self.segments[t + 1].shortcut
    return rotations.can_rotate(self.segments[t], leaving)

  def _reader_rotation(self, t: int) -> jax.Array | None:
    """Returns the canonical rotation of the readers; None if a shortcut has it."""
    if self.options.frame(self.widths, t, 0).from_shortcut:
      return None
    readers = self.segments[t].readers.values()
    return rotations.reader_rotation(readers, self.options.canonicalizer)

  def _push_segment(self, arrays: segments.Arrays, first: segments.Arrays) -> None:
    """Pushes the arrays around a segment, without the columns pushed first."""
    others = {path: arrays[path][:, self.fixed :] for path in first}
    self._push((arrays | others).values())
    for path, columns in first.items():
      arrays[path] = np.concatenate([columns, others[path]], axis=1)
    self.stored |= _stored(arrays)

  def _push(self, arrays: Iterable[np.ndarray]) -> None:
    """Pushes arrays onto the message."""
    if self.options.entropy:
      spec, coded = _coded(arrays)
      self.coders.append(spec)
      arrays = [coded]
    for array in arrays:
      self.message.push(np.ascontiguousarray(array).reshape(-1).view(np.uint16))

  def _push_first(
    self, segment: segments.SegmentParameters, neutral: jax.Array | None
  ) -> segments.Arrays:
    """Pushes and returns first columns of the embeddings, to pay for a rotation."""
    tables = {k: x for k, x in segment.writers.items() if k.startswith('embed/')}
    bits = min(8 * x.itemsize for x in tables.values())
    bits *= sum(x.shape[0] for x in tables.values())  # bits of a column
    bits *= 0.6 if self.options.entropy else 1.0  # about
    width = self.widths[0]

    def needed(n: int) -> int:
      return 9 * n * (n + 1) + 64 * self.lanes

    enough = (f for f in range(width) if f * bits >= needed(width - f))
    self.fixed = next(enough, width)
    first = {
      path: np.asarray(rotations.rotate(x, None, neutral))[:, : self.fixed]
      for path, x in tables.items()
    }
    self._push(first.values())
    return first

  def _pop_rotation(
    self,
    segment: segments.SegmentParameters,
    frame: layout_lib.Frame,
    neutral: jax.Array | None,
  ) -> _Rotated | None:
    """Pops a rotation and applies it; None, and pops none, if it saves nothing."""
    code = self.options.code(frame)
    rows = min(code.max_rows(self.lanes), self.message.size // self.lanes)
    if not rows:
      return None
    words = self.message.pop(rows * self.lanes)
    self.message.push(words)  # until the rotation is certain
    stacked = rans.stacked(jnp.asarray(words.reshape(rows, self.lanes)))
    message, integers, q = code.sample(stacked)
    if int(np.min(message.size)) < 0:  # it ran dry
      return None
    rotation = self._rotation(segment, frame, neutral, q)
    arrays = rotations.rotated(segment, self.before, rotation)
    correction = self._correction(segment, frame, arrays, message, integers)
    if correction is None:
      return None
    levels, residues = correction_lib.pack(correction, code.groups())
    spec, coded = _coded(levels)
    left = rans.to_words(message)
    cost = residues.size + coded.size
    net = words.size - left.size - cost
    if net <= 0:
      return None
    self.message.pop(words.size)
    self.message.push(left)
    self.corrections.push(residues)
    self.corrections.push(coded)
    self.coders.append(spec)
    source = 'shortcut' if frame.from_shortcut else 'readers'
    note = {'found in': source, 'correction': 16 * cost, 'net': 16 * net}
    return _Rotated(rotation, arrays, note)

  def _rotation(
    self,
    segment: segments.SegmentParameters,
    frame: layout_lib.Frame,
    neutral: jax.Array | None,
    q: jax.Array,
  ) -> jax.Array:
    """Returns the rotation T of a segment with the sampled frame, see `paper`."""
    if frame.from_shortcut:
      (shortcut,) = segment.shortcut.values()
      return rotations.chained(shortcut, self.before, q)
    return rotations.counter_rotated(neutral, q)

  def _correction(
    self,
    segment: segments.SegmentParameters,
    frame: layout_lib.Frame,
    arrays: segments.Arrays,
    message: rans.Message,
    integers: jax.Array,
  ) -> correction_lib.Correction | None:
    """Returns the correction of a frame; None if it does not give the integers back."""
    code = self.options.code(frame)
    recovered, elsewhere = (
      rotations.recovered(
        frame, segment, arrays, self.options.canonicalizer, disturb=disturb
      )
      for disturb in (False, True)
    )
    correction = code.correct(recovered, elsewhere, integers)
    # The decoder's own steps on two machines, tried before anything is written.
    for matrix in (recovered, elsewhere) if self.options.exact else ():
      _, restored = code.restore(message, matrix, correction)
      if not jnp.array_equal(restored, integers):
        return None
    return correction
