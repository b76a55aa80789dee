"""The encoder of the published scheme.

It reads a few layers at a time from a source. It hands out the words of the message as
soon as no rotation can be sampled from them.
"""

import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables as tables_lib
from rotbits_jax.coding.bits_back import numbers
from rotbits_jax.coding.bits_back import word_stack
from rotbits_jax.paper import decoder
from rotbits_jax.paper import layout as layout_lib
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import rotations
from rotbits_jax.paper import segments
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system.progress import track

Note = dict[str, Any]  # JSON values


class Encoded(NamedTuple):
  """An encoded model without the words of its message.

  Attributes:
    layout: JSON values that `decode` needs.
    corrections: uint16, the stream of corrections.
    tables: uint8, the stream of frequency tables.
    notes: for each segment, the popped bits, the bits of the correction, and the
      difference.
    net_bits: bits that all rotations saved.
    digests: the CRC-32 of each stored array's bytes in C order, by path. `layout`
      contains them, too, and `decode` checks them.
  """

  layout: dict[str, Any]
  corrections: np.ndarray
  tables: np.ndarray
  notes: list[Note]
  net_bits: float
  digests: dict[str, int]


def refuse(source: passes.Source, options: options_lib.Options) -> None:
  """Raises an error if a model cannot be coded. It reads only shapes and dtypes.

  Args:
    source: the model.
    options: the options of the scheme.

  Raises:
    ValueError: if the options cannot be combined, if the model is dense, or if a
      parameter is not an array of floats with the shape that the config implies.
  """
  options.check()
  if not source.config.sliced:
    raise ValueError(
      'a dense model has no shortcuts, so its segments cannot be rotated'
    )
  reader = segments.Reader(source)
  for part in segments.parts(source.config):
    for path, shape in part.all.items():
      leaf = reader.leaf(path)
      if leaf is None or structured.is_structured(leaf):
        raise ValueError(
          f'{path}: the parameter must be an array, got {type(leaf).__name__}'
        )
      if np.dtype(leaf.dtype).name not in layout_lib.DTYPES:
        raise ValueError(f'{path}: numbers must be floats, got {leaf.dtype}')
      if tuple(leaf.shape) != shape:
        raise ValueError(
          f'{path}: the config implies the shape {shape}, got {leaf.shape=}'
        )


def encode(
  source: passes.Source,
  options: options_lib.Options,
  spill: word_stack.Spill,
  *,
  progress: bool = False,
) -> Encoded:
  """Encodes a sliced model by the published scheme.

  Args:
    source: the model. A layer is read once or twice, in order.
    options: the options of the scheme.
    spill: takes the words of the message, uint16, piece by piece in the order of the
      stream. It must not keep an array after it returns. With a threshold, the words
      are also written to a temporary file, because only decoding shows which errors
      the numbers keep.
    progress: whether to show the progress on stderr.

  Returns:
    The encoded model without the message.

  Raises:
    ValueError: see `refuse`.
  """
  refuse(source, options)
  if options.threshold is None:
    return _Encoder(source, options, spill).run(progress)
  with tempfile.TemporaryFile() as file:

    def tee(words: np.ndarray) -> None:
      spill(words)
      file.write(np.ascontiguousarray(words).tobytes())

    encoded = _Encoder(source, options, tee).run(progress)
    file.flush()
    message = np.memmap(file, np.uint16, mode='r')
    arrays = decoder.decode_unchecked(
      encoded.layout, message, encoded.corrections, encoded.tables, source.config
    )
    digests = {path: checksums_lib.of_array(array) for path, array in arrays}
  stored = encoded.layout['arrays']
  layout = encoded.layout | {
    'arrays': {path: [stored[path][0], digests[path]] for path in stored}
  }
  return encoded._replace(layout=layout, digests=digests)


class _Trial(NamedTuple):
  """A segment with a sampled rotation that the decoder can recover."""

  arrays: segments.Arrays  # the rotated parameters
  rotation: jax.Array
  window: rans.Message  # the window after the rotation was popped
  rows: int  # number of rows that were moved to the window for this rotation
  correction: np.ndarray  # words of the correction
  table: np.ndarray  # frequency tables of the correction
  popped: float  # bits that were popped

  @property
  def cost(self) -> float:
    """Bits of the correction, including the length of its block."""
    return 16.0 * (self.correction.size + 2)

  @property
  def net(self) -> float:
    """Bits that the rotation saves."""
    return self.popped - self.cost


class _Encoder:
  """The state of one call of `encode`."""

  def __init__(
    self,
    source: passes.Source,
    options: options_lib.Options,
    spill: word_stack.Spill,
  ):
    self.config, self.options, self.spill = source.config, options, spill
    self.widths = source.config.segment_widths
    self.reader = segments.Reader(source)
    self.parts = segments.parts(source.config)
    self.stack = word_stack.WordStack(spill=spill)
    self.corrections = word_stack.WordStack()
    self.window: rans.Message | None = None
    self.tables: list[np.ndarray] = []
    self.lanes = options_lib.max_lanes(self.widths)
    self.capacity = options_lib.capacity(self.widths, self.lanes, options)
    self.fixed = 0
    self.before: jax.Array | None = None  # the rotation of the previous segment
    self.stored: dict[str, layout_lib.Stored] = {}
    self.rows: list[int | None] = []
    self.notes: list[Note] = []
    self.net_bits = 0.0

  def run(self, progress: bool) -> Encoded:
    """Encodes the whole model."""
    count = len(self.parts)
    for t in track(range(count), 'encode', 'segment', total=count, show=progress):
      self._code(t)
    self.stack.settle(0)
    window = np.zeros(0, np.uint16)
    if self.window is not None:
      window = rans.to_words(self.window)
      self.spill(window)
    layout = layout_lib.Layout(
      options=self.options,
      lanes=self.lanes,
      fixed=self.fixed,
      window=window.size,
      rows=tuple(self.rows),
      arrays=self.stored,
    )
    tables = tables_lib.to_bytes(layout_lib.padded(self.tables))
    return Encoded(
      layout=layout.to_json(),
      corrections=self.corrections.pop(self.corrections.size),
      tables=np.frombuffer(tables, np.uint8),
      notes=self.notes,
      net_bits=self.net_bits,
      digests={path: stored.digest for path, stored in self.stored.items()},
    )

  def _code(self, t: int) -> None:
    """Encodes one segment."""
    segment = rotations.Segment(
      self.widths[t], *(self.reader.arrays(shapes) for shapes in self.parts[t])
    )
    can_turn = rotations.can_turn(segment)
    neutral = self._neutral(t, segment) if can_turn else None
    first = {} if t else self._push_first(segment, neutral)
    trial = self._sample(t, segment, neutral) if can_turn else None
    if trial is None:
      # The columns that `_push_first` pushed are already in canonical form.
      rotation = None if t else neutral
      arrays = rotations.turned(segment, self.before, rotation)
    else:
      rotation, arrays = trial.rotation, trial.arrays
      self.window = trial.window
      self.net_bits += trial.net
    for path in self.parts[t].all:
      array = arrays[path]
      if path in first:
        rest = np.ascontiguousarray(array[:, self.fixed :])
        self._push(rest)
        array = np.concatenate([first[path], rest], axis=1)
      else:
        self._push(array)
      self.stored[path] = layout_lib.Stored(
        array.dtype.name, checksums_lib.of_array(array)
      )
    if trial is not None:
      self.corrections.push_block(trial.correction)
      self.tables.extend(trial.table)
    self.before = rotation
    self.rows.append(None if trial is None else trial.rows)
    self.notes.append(self._note(t, trial))

  def _note(self, t: int, trial: _Trial | None) -> Note:
    note: Note = {'segment': t, 'width': self.widths[t], 'found in': None}
    if trial is None:
      return note
    return note | {
      'found in': 'shortcut' if self._frame(t).from_shortcut else 'readers',
      'popped': round(trial.popped),
      'correction': round(trial.cost),
      'net': round(trial.net),
      'of 16 d(d-1)/2': round(trial.net / _ideal(self.widths[t]), 4),
    }

  def _frame(self, t: int) -> options_lib.Frame:
    return options_lib.frame(self.widths, t, self.fixed, self.options)

  def _push(self, array: np.ndarray) -> None:
    """Pushes an array, and spills the words from which no rotation will be sampled."""
    table = numbers.push(self.stack, array, entropy=self.options.entropy)
    if table is not None:
      self.tables.append(table)
    self.stack.settle((self.capacity + 1) * self.lanes)

  def _neutral(self, t: int, segment: rotations.Segment) -> jax.Array | None:
    """Returns the canonical rotation of the readers; None if T is found otherwise."""
    if self._frame(t).from_shortcut:
      return None
    return rotations.reader_rotation(
      segment.readers.values(), self.options.canonicaliser
    )

  def _push_first(
    self, segment: rotations.Segment, neutral: jax.Array | None
  ) -> segments.Arrays:
    """Pushes the first columns of the embeddings, from which a rotation is sampled.

    The rotation acts on the other columns. If the first columns are too few, the first
    segment is not rotated.

    Returns:
      The pushed columns, by path.
    """
    tables = {k: x for k, x in segment.writers.items() if k.startswith('embed/')}
    dtypes = {x.dtype for x in tables.values()}
    bits = min(8 * x.itemsize for x in dtypes) * (0.6 if self.options.entropy else 1.0)
    bits *= sum(x.shape[0] for x in tables.values())  # bits of a column, about

    def needed(n: int) -> int:
      return 9 * n * (n + 1) + 64 * self.lanes

    enough = (f for f in range(segment.width) if f * bits >= needed(segment.width - f))
    self.fixed = next(enough, segment.width)
    columns = None if neutral is None else neutral[:, : self.fixed]
    first = {
      k: rotations.turn_columns(x[:, : self.fixed] if columns is None else x, columns)
      for k, x in tables.items()
    }
    for array in first.values():
      self._push(array)
    return first

  def _sample(
    self, t: int, segment: rotations.Segment, neutral: jax.Array | None
  ) -> _Trial | None:
    """Samples a segment's rotation; None if that is impossible or saves nothing."""
    shape, new = self._frame(t), self.window is None
    if not shape.n:
      return None
    code = options_lib.code(shape, self.options)
    least = 0 if self.window is None else int(np.min(self.window.size))
    available = self.stack.size // self.lanes - new
    rows = max(min(code.max_rows(self.lanes) - least, available), 0)
    if new and not rows:
      return None
    try:
      window = word_stack.refill(
        self.window, self.stack, rows, self.lanes, self.capacity
      )
    except ValueError:  # the fullest lane has no room for the rows
      return None
    trial = self._trial(t, segment, neutral, window, rows)
    if trial is None:
      window = word_stack.drain(window, self.stack, rows, last=new)
      self.window = None if new else window
    return trial

  def _trial(
    self,
    t: int,
    segment: rotations.Segment,
    neutral: jax.Array | None,
    window: rans.Message,
    rows: int,
  ) -> _Trial | None:
    """Samples a rotation from a refilled window, and recovers it as the decoder will.

    Returns:
      The result; None if the decoder could not recover the rotation, or if it saves
      nothing.
    """
    shape = self._frame(t)
    code = options_lib.code(shape, self.options)
    sampled, latent, q = code.sample(window)
    if int(np.min(sampled.lowest)) < 0 or int(np.max(sampled.highest)) > self.capacity:
      return None
    rotation = rotations.sampled_rotation(shape, segment, neutral, self.before, q)
    arrays = rotations.turned(segment, self.before, rotation)
    recovered, other = (
      rotations.recovered(
        shape, self.parts[t], arrays, self.options.canonicaliser, disturb=disturb
      )
      for disturb in (False, True)
    )
    correction = code.correct(recovered, latent, q, other)
    table = code.fit(correction)
    # The decoder's own steps on two machines, tried before anything is written.
    for frame in (recovered, other) if self.options.threshold is None else ():
      _, again = code.restore(sampled, frame, correction)
      same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), again, latent)
      if not all(jax.tree.leaves(same)):
        return None
    trial = _Trial(
      arrays=arrays,
      rotation=rotation,
      window=sampled,
      rows=rows,
      correction=code.pack(correction, table),
      table=table,
      popped=rans.content_bits(window) - rans.content_bits(sampled),
    )
    return trial if trial.net > 0 else None


def _ideal(width: int) -> float:
  """Returns the ideal saving: 16 bits for each free number of a rotation."""
  return max(8.0 * width * (width - 1), 1.0)
