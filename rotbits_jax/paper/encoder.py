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
    self.options, self.widths = options, source.config.segment_widths
    self.segments = segments.read(source)
    self.message, self.corrections = stack.WordStack(), stack.WordStack()
    self.lanes = layout_lib.lanes(self.widths)
    self.fixed = 0  # columns of the embeddings that are pushed first
    self.before: jax.Array | None = None  # the rotation of the previous segment
    self.coders: list[specs.StreamSpec] = []
    self.stored: dict[str, layout_lib.Stored] = {}
    self.notes: list[dict[str, Any]] = []

  def push(self, t: int) -> None:
    """Encodes one segment."""
    segment, canonicalizer = self.segments[t], self.options.canonicalizer
    leaving = self.segments[t + 1].shortcut if t + 1 < len(self.segments) else {}
    can_rotate = rotations.can_rotate(segment, leaving)
    neutral = None  # the canonical rotation of the readers
    if can_rotate and not self.options.frame(self.widths, t, 0).from_shortcut:
      neutral = rotations.reader_rotation(segment.readers.values(), canonicalizer)
    first = {} if t else self._push_first(segment, neutral)
    frame = self.options.frame(self.widths, t, self.fixed)
    sample = self._sample(segment, frame, neutral) if can_rotate and frame.n else None
    if sample is None:
      # The columns that `_push_first` pushed are already in canonical form.
      rotation = None if t else neutral
      sample = rotation, rotations.rotated(segment, self.before, rotation), {}
    self.before, arrays, note = sample
    arrays = {path: arrays[path] for path in segment.all}
    others = {path: arrays[path][:, self.fixed :] for path in first}
    self._push((arrays | others).values())
    for path, columns in first.items():
      arrays[path] = np.concatenate([columns, others[path]], axis=1)
    self.stored |= _stored(arrays)
    self.notes.append({'segment': t, 'width': self.widths[t], 'found in': None} | note)

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
    """Pushes and returns first columns of the embeddings: they pay for the rotation."""
    tables = {k: x for k, x in segment.writers.items() if k.startswith('embed/')}
    bits = min(8 * x.itemsize for x in tables.values())
    bits *= sum(x.shape[0] for x in tables.values())  # bits of a column
    bits *= 0.6 if self.options.entropy else 1.0  # about
    width = self.widths[0]
    needed = lambda n: 9 * n * (n + 1) + 64 * self.lanes
    enough = (f for f in range(width) if f * bits >= needed(width - f))
    self.fixed = next(enough, width)
    first = {
      path: np.asarray(rotations.rotate(x, None, neutral))[:, : self.fixed]
      for path, x in tables.items()
    }
    self._push(first.values())
    return first

  def _sample(
    self,
    segment: segments.SegmentParameters,
    frame: layout_lib.Frame,
    neutral: jax.Array | None,
  ) -> tuple[jax.Array | None, segments.Arrays, dict[str, Any]] | None:
    """Returns a rotation, rotated parameters and a note; None if it saves nothing."""
    code, canonicalizer = self.options.code(frame), self.options.canonicalizer
    rows = min(code.max_rows(self.lanes), self.message.size // self.lanes)
    if not rows:
      return None
    words = self.message.pop(rows * self.lanes)
    self.message.push(words)  # until the rotation is certain
    stacked = rans.stacked(jnp.asarray(words.reshape(rows, self.lanes)))
    message, integers, q = code.sample(stacked)
    if int(np.min(message.size)) < 0:  # it ran dry
      return None
    if frame.from_shortcut:
      (shortcut,) = segment.shortcut.values()
      rotation = rotations.chained(shortcut, self.before, q)
    else:
      rotation = rotations.counter_rotated(neutral, q)
    arrays = rotations.rotated(segment, self.before, rotation)
    recovered, elsewhere = (
      rotations.recovered(frame, segment, arrays, canonicalizer, disturb=disturb)
      for disturb in (False, True)
    )
    correction = code.correct(recovered, elsewhere, integers)
    # The decoder's own steps on two machines, tried before anything is written.
    for matrix in (recovered, elsewhere) if self.options.exact else ():
      _, restored = code.restore(message, matrix, correction)
      if not jnp.array_equal(restored, integers):
        return None
    levels, residues = correction_lib.pack(correction, code.groups())
    (spec, coded), left = _coded(levels), rans.to_words(message)
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
    return rotation, arrays, note
