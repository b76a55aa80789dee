r"""The published scheme: rotations by bits-back coding, over a whole checkpoint.

All numbers of the model go onto one message, as they are or entropy coded. Before what
a residual segment touches is pushed, a rotation of the segment is *popped* from the
message and applied; the decoder, which finds the rotated weights, recovers the rotation
from them and pushes it back. With segments 0 .. S and sublayers s = 0 .. S-1:

    push the first columns of the embeddings        they pay for the first rotation
    pop T_0, push the rest of the embeddings, push its correction
    for s = 0 .. S-1:
      pop T_{s+1}, push sublayer s rotated by T_s, T_{s+1}, push its correction
    push the head rotated by T_S

and the decoder does the inverse from the end. How T is parametrised depends on what it
is recovered from (`symmetries.canonical`):

* `svd`, `qr`: from a matrix W that reads the segment: W = C W_ref, T = C Q^T with Q
  sampled, so the stored T^T W is Q W_ref, and Q_hat its canonical rotation.
* `polar_shortcut`: from the shortcut M = [P 0] O that leads into the segment:
  T_{s+1} = O^T (T_s + I) Z, so the stored T_s^T M T_{s+1} is [T_s^T P T_s, 0] Z, whose
  polar factor is the first rows of Z. Only these are sampled (a Stiefel frame). The
  first segment, and one narrower than that before it, is recovered as by `qr`.

The rotation is sampled by one of two codes: `haar`, exactly uniform, or
`symmetric_eig`, the eigenvectors of a matrix of numbers, as published. A segment whose
rotation cannot be recovered, or only at a loss, or whose bits the message does not
hold yet, is left as it is.

What is decoded is the rotated model, bit for bit as `encode` reports it.

Reference: J. He, G. Flamich, J. M. Hernandez-Lobato, Getting Free Bits Back from
Rotational Symmetries in LLMs, arXiv 2410.01309, section 3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rotbits_jax import models
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import numbers
from rotbits_jax.coding.bits_back import rotation_codes
from rotbits_jax.coding.weights import floats
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import residual
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import transform

Arrays = dict[str, np.ndarray]  # by path, as in 'layers.3/attention/query/kernel'

_matmul = functools.partial(jnp.matmul, precision='highest')


# ---- the model as segments -----------------------------------------------------------


class Segment(NamedTuple):
  """The parameters around one residual segment, by path."""

  width: int
  readers: Arrays  # [d, out]: what is multiplied by the segment, but the shortcut
  writers: Arrays  # [in, d] or [d]: what adds to it, but the shortcut
  shortcut: tuple[str, np.ndarray] | None  # that leads into it
  unturned: Arrays  # the readers' biases, which no rotation changes


def segments(model: models.Model) -> list[Segment]:
  """The segments of a sliced model in order; every parameter is in one of them."""
  outer = model.outer()
  found = [Segment(d, {}, {}, None, {}) for d in model.config.segment_widths]
  for name, table in outer['embed'].items():
    found[0].writers[f'embed/{name}'] = table
  found[-1].readers['head/kernel'] = outer['head']['kernel']
  if 'bias' in outer['head']:
    found[-1].unturned['head/bias'] = outer['head']['bias']
  step = model.config.segments_per_layer
  for i, layer in enumerate(model.layers()):
    for sublayer, s in (('attention', i * step), ('mlp', (i + 1) * step - 1)):
      for linear, params in layer[sublayer].items():
        path = f'layers.{i}/{sublayer}/{linear}'
        if linear == models.WRITERS[sublayer]:
          found[s + 1].writers.update({f'{path}/{k}': v for k, v in params.items()})
        else:
          found[s].readers[f'{path}/kernel'] = params['kernel']
          if 'bias' in params:
            found[s].unturned[f'{path}/bias'] = params['bias']
      if f'{sublayer}_shortcut' in layer:
        path = f'layers.{i}/{sublayer}_shortcut/kernel'
        shortcut = path, layer[f'{sublayer}_shortcut']['kernel']
        found[s + 1] = found[s + 1]._replace(shortcut=shortcut)
  return found


def reader_rotation(readers: Arrays, canonicaliser: str) -> jax.Array:
  """The canonical rotation of what reads a segment: float32 `[d, d]`.

  The readers side by side are W `[d, m]`. `svd` takes them as they are. `qr`, which
  also serves the segments that `polar_shortcut` has no shortcut for, takes the sum of
  every d-th column: a square matrix far better conditioned than any block of W, like
  that of a head whose first tokens never occur.
  """
  parts = [np.asarray(x, np.float32) for x in readers.values()]
  matrix = np.concatenate(parts, axis=1)
  if canonicaliser == 'svd':
    return _canonicalisers['svd'](matrix)[1]
  width, columns = matrix.shape
  folded = np.pad(matrix, ((0, 0), (0, -columns % width))).reshape(width, -1, width)
  return _canonicalisers['qr'](folded.sum(axis=1))[1]


def _can_turn(segment: Segment) -> bool:
  """Whether no rotation of the segment can carry a number past its format's range."""
  arrays = [*segment.readers.values(), *segment.writers.values()]
  arrays = [np.asarray(x, np.float32) for x in arrays]
  norms = [np.linalg.norm(x, axis=0) for x in arrays[: len(segment.readers)]]
  norms += [np.linalg.norm(x, axis=-1) for x in arrays[len(segment.readers) :]]
  dtypes = [x.dtype for x in (*segment.readers.values(), *segment.writers.values())]
  return all(
    bool(np.all(norm < 0.99 * float(jnp.finfo(dtype).max)))
    for norm, dtype in zip(norms, dtypes, strict=True)
  )


# ---- rotations -----------------------------------------------------------------------


@jax.jit
def _shortcut_frame(shortcut: jax.Array) -> jax.Array:
  """The polar factor of a stored shortcut `[d, e]`, transposed: `[e, d]`."""
  u, _, vt = jnp.linalg.svd(shortcut.astype(jnp.float32), full_matrices=False)
  return _matmul(u, vt).T


@jax.jit
def _complete(frame: jax.Array) -> jax.Array:
  """An orthogonal `[n, n]` whose first columns are the frame `[n, k]`."""
  q, _ = jnp.linalg.qr(frame, mode='complete')
  return jnp.concatenate([frame, q[:, frame.shape[1] :]], axis=1)


_turn = jax.jit(rotations_lib.turn)
_polar = jax.jit(residual.polar)
_reorthogonalize = jax.jit(canonical.reorthogonalize)
_canonicalisers = {k: jax.jit(f) for k, f in canonical.CANONICALISERS.items()}


class Options(NamedTuple):
  """The parts of the scheme.

  Attributes:
    canonicaliser: 'svd' (as published), 'qr' or 'polar_shortcut'.
    rotation_codec: 'symmetric_eig' (as published) or 'haar'.
    threshold: with 'symmetric_eig', errors of the message up to this are left in, as
      published; None corrects all of them.
    entropy: whether numbers are entropy coded.
  """

  canonicaliser: str = 'polar_shortcut'
  rotation_codec: str = 'haar'
  threshold: float | None = None
  entropy: bool = False


class _Frame(NamedTuple):
  """Where a segment's rotation is recovered from, and the sampled frame's shape."""

  from_shortcut: bool
  fixed: int  # leading coordinates that are not rotated
  n: int
  k: int


def _frame(
  widths: tuple[int, ...], segment: int, fixed: int, options: Options
) -> _Frame:
  width = widths[segment]
  if options.canonicaliser == 'polar_shortcut' and segment:
    before = widths[segment - 1]
    # The eigenvectors of a matrix are never part of a frame.
    if before == width or (before < width and options.rotation_codec == 'haar'):
      return _Frame(True, 0, width, before)
  return _Frame(False, fixed, width - fixed, width - fixed)


def _code(frame: _Frame, options: Options) -> rotation_codes.RotationCode:
  if options.rotation_codec == 'haar':
    return rotation_codes.haar_code(frame.n, frame.k)
  return rotation_codes.symmetric_eig_code(frame.n, options.entropy, options.threshold)


# ---- a whole model -------------------------------------------------------------------


STREAMS = ('message', 'corrections', 'tables')
"""Names of the streams that `encode` makes."""


class Encoded(NamedTuple):
  """What `encode` makes.

  Attributes:
    layout: JSON values that `decode` needs.
    streams: 'message', 'corrections' (uint16) and 'tables' (uint8).
    arrays: the stored parameters, by path.
    notes: for each segment the bits popped, those of the correction, and the net.
    net_bits: what the rotations gave back in all.
  """

  layout: dict[str, Any]
  streams: dict[str, np.ndarray]
  arrays: Arrays
  notes: list[dict[str, Any]]
  net_bits: float


def encode(model: models.Model, options: Options, *, progress: bool = False) -> Encoded:
  """Codes a sliced model by the published scheme.

  Args:
    model: the model.
    options: the parts of the scheme.
    progress: whether to show a progress bar if stderr is a terminal.

  Returns:
    Streams, layout, and the rotated model that they hold.

  Raises:
    ValueError: if the model has no shortcuts, or numbers that are not floats.
  """
  if not model.config.sliced:
    raise ValueError('a dense model has no shortcuts: its segments cannot be rotated')
  model = jax.tree.map(np.asarray, model.materialize())
  given, widths = segments(model), model.config.segment_widths
  words = sum(x.nbytes for x in jax.tree.leaves(model.params)) // 2
  message = _empty(words)
  corrections = _empty(words // 8)
  fixed = _first_columns(given[0], options, message.lanes)
  start = _start(given, options, fixed)
  stored, parts, sampled, notes = dict(start), [], [], []
  rows: list[np.ndarray] = []
  net_bits, turn = 0.0, np.zeros((0, 0), np.float32)

  def push(arrays: Arrays) -> None:
    nonlocal message
    message, own = numbers.push(message, list(arrays.values()), entropy=options.entropy)
    rows.extend(own)
    parts.append([[k, x.dtype.name, list(x.shape)] for k, x in arrays.items()])

  push(start)
  bar = tqdm.tqdm(given, 'encode', unit='segment', disable=None if progress else True)
  for t, segment in enumerate(bar):
    frame = _frame(widths, t, 0 if t else fixed, options)
    trial = _sample(message, corrections, frame, segment, turn, options)
    note: transform.Note = {'segment': t, 'width': widths[t], 'found in': None}
    if trial is None:
      turned = _turned(segment, turn, _neutral(segment, frame, options))
    else:
      turned, message, corrections = trial.turned, trial.message, trial.corrections
      rows += list(trial.tables)
      net_bits += trial.popped - trial.cost
      note |= {
        'found in': 'shortcut' if frame.from_shortcut else 'readers',
        'popped': round(trial.popped),
        'correction': round(trial.cost),
        'net': round(trial.popped - trial.cost),
        'of 16 d(d-1)/2': round((trial.popped - trial.cost) / _ideal(widths[t]), 4),
      }
    sampled.append(trial is not None)
    notes.append(note)
    turn = turned.turn
    push(
      {
        k: x[:, fixed:] if k.startswith('embed/') else x
        for k, x in turned.arrays.items()
      }
    )
    stored |= turned.arrays
  for path, first in start.items():
    if path.startswith('embed/'):
      stored[path] = np.concatenate([first, stored[path][:, fixed:]], axis=1)
  layout = {
    'options': options._asdict(),
    'lanes': [message.lanes, corrections.lanes],
    'fixed': fixed,
    'parts': parts,
    'sampled': sampled,
    'tables': len(rows),
  }
  streams = {
    'message': rans.to_words(message),
    'corrections': rans.to_words(corrections),
    'tables': np.frombuffer(tables.to_bytes(_padded(rows)), np.uint8),
  }
  return Encoded(layout, streams, stored, notes, net_bits)


def decode(
  layout: dict[str, Any],
  streams: dict[str, np.ndarray],
  widths: tuple[int, ...],
  *,
  progress: bool = False,
) -> Arrays:
  """The inverse of `encode`.

  Args:
    layout: as in `Encoded`.
    streams: likewise.
    widths: of the model's segments.
    progress: whether to show a progress bar if stderr is a terminal.

  Returns:
    The stored parameters, by path.

  Raises:
    ValueError: if the streams do not fit the layout.
  """
  options = Options(**layout['options'])
  rows = list(
    tables.from_bytes(streams['tables'].tobytes(), layout['tables'], _ALPHABET)
  )
  message, corrections = (
    rans.from_words(streams[name], lanes, _room(streams[name], lanes))
    for name, lanes in zip(('message', 'corrections'), layout['lanes'], strict=True)
  )
  fixed, (first, *parts) = layout['fixed'], layout['parts']
  stored: Arrays = {}

  def take(count: int) -> list[np.ndarray]:
    taken = rows[len(rows) - count :]
    del rows[len(rows) - count :]
    return taken

  def pop(part: list[Any]) -> Arrays:
    nonlocal message
    specs = [(dtype, tuple(shape)) for _, dtype, shape in part]
    own = take(len(specs)) if options.entropy else None
    message, arrays = numbers.pop(message, specs, own)
    return dict(zip([path for path, _, _ in part], arrays, strict=True))

  order = list(enumerate(zip(parts, layout['sampled'], strict=True)))[::-1]
  bar = tqdm.tqdm(order, 'decode', unit='segment', disable=None if progress else True)
  for t, (part, sampled) in bar:
    arrays = pop(part)
    stored |= arrays
    if sampled:
      frame = _frame(widths, t, 0 if t else fixed, options)
      code = _code(frame, options)
      table = np.stack(take(code.num_tables))[:, : correction_lib.LEVELS]
      corrections, correction = _pop_correction(corrections, frame, options, table)
      recovered = _recovered(frame, arrays, options)
      message, _ = code.restore(message, recovered, correction)
  start = pop(first)
  for path, array in start.items():
    rest = stored.get(path)
    stored[path] = array if rest is None else np.concatenate([array, rest], axis=1)
  for left in (rans.check(message), rans.check(corrections)):
    if np.any(left.size) or rows:
      raise ValueError('the message holds more than the model')
  return stored


class _Turned(NamedTuple):
  """A segment's parameters as they are stored, and the rotation that made them so."""

  arrays: Arrays
  turn: np.ndarray  # T, float32 [d, d]


class _Trial(NamedTuple):
  """A segment with a sampled rotation that the decoder will recover."""

  turned: _Turned
  message: rans.Message
  corrections: rans.Message
  tables: np.ndarray
  popped: float
  cost: float


def _sample(
  message: rans.Message,
  corrections: rans.Message,
  frame: _Frame,
  segment: Segment,
  before: np.ndarray,
  options: Options,
) -> _Trial | None:
  """Samples a segment's rotation; None where that cannot be, or gains nothing."""
  if not frame.n or not _can_turn(segment):
    return None
  code = _code(frame, options)
  sampled, latent, q = code.sample(message)
  if int(np.min(sampled.lowest)) < 0:
    return None
  turned = _turned(segment, before, _sampled_turn(frame, segment, before, q, options))
  recovered = _recovered(frame, turned.arrays, options)
  correction = code.correct(recovered, latent)
  table = code.fit(correction)
  pushed = _push_correction(corrections, frame, options, table, correction)
  popped = rans.content_bits(message) - rans.content_bits(sampled)
  cost = rans.content_bits(pushed) - rans.content_bits(corrections)
  # The decoder's own steps, before anything is written.
  _, again = code.restore(sampled, recovered, correction)
  same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), again, latent)
  if cost >= popped or (options.threshold is None and not all(jax.tree.leaves(same))):
    return None
  return _Trial(turned, sampled, pushed, table, popped, cost)


def _neutral(segment: Segment, frame: _Frame, options: Options) -> np.ndarray:
  """The rotation to canonical form, by which nothing is sampled."""
  width = frame.fixed + frame.n
  if frame.from_shortcut or not _can_turn(segment):
    return np.eye(width, dtype=np.float32)
  return np.asarray(reader_rotation(segment.readers, options.canonicaliser))


def _sampled_turn(
  frame: _Frame, segment: Segment, before: np.ndarray, q: jax.Array, options: Options
) -> np.ndarray:
  """T of a segment whose sampled frame is q."""
  if frame.from_shortcut and segment.shortcut is not None:
    step = _polar(segment.shortcut[1]).rotation
    chained = _matmul(step.T, rotations_lib.embed(before, frame.n))
    return np.asarray(_reorthogonalize(_matmul(chained, _complete(q).T)))
  whole = jnp.eye(frame.fixed + frame.n).at[frame.fixed :, frame.fixed :].set(q)
  return np.asarray(
    _reorthogonalize(_matmul(_neutral(segment, frame, options), whole.T))
  )


def _turned(segment: Segment, before: np.ndarray, turn: np.ndarray) -> _Turned:
  """Rotates what touches a segment, given the rotation of the one before it."""
  arrays = {k: _turn(x, rows=turn) for k, x in segment.readers.items()}
  arrays |= {k: _turn(x, columns=turn) for k, x in segment.writers.items()}
  if segment.shortcut is not None:
    path, matrix = segment.shortcut
    arrays[path] = _turn(matrix, rows=before, columns=turn)
  return _Turned({k: np.asarray(x) for k, x in arrays.items()}, turn)


def _recovered(frame: _Frame, arrays: Arrays, options: Options) -> jax.Array:
  """The sampled frame, inexactly, from what is stored of the segment."""
  if frame.from_shortcut:
    (shortcut,) = [x for path, x in arrays.items() if '_shortcut/' in path]
    return _shortcut_frame(shortcut)
  # Dicts keep their order, so both sides see the readers in the same one.
  readers = {path: x for path, x in arrays.items() if _is_reader(path)}
  q = reader_rotation(readers, options.canonicaliser)
  return q[frame.fixed :, frame.fixed :]


def _is_reader(path: str) -> bool:
  return path.split('/')[-2] in ('head', 'query', 'key', 'value', 'up', 'gate')


def _start(given: list[Segment], options: Options, fixed: int) -> Arrays:
  """What is pushed first: all that no rotation touches."""
  frame = _Frame(False, fixed, given[0].width - fixed, given[0].width - fixed)
  neutral = _neutral(given[0], frame, options)
  arrays = {
    k: _turn(x, columns=neutral)[:, :fixed] for k, x in given[0].writers.items()
  }
  for segment in given:
    arrays |= segment.unturned
  return {k: np.asarray(x) for k, x in arrays.items()}


def _first_columns(segment: Segment, options: Options, lanes: int) -> int:
  """How many columns of the embeddings pay for rotating the others.

  Too few are harmless: then the first segment is not rotated.
  """
  dtype = next(iter(segment.writers.values())).dtype
  bits = 8 * dtype.itemsize * (0.6 if options.entropy else 1.0)
  numbers = sum(x.shape[0] for x in segment.writers.values())
  for fixed in range(segment.width):
    n = segment.width - fixed
    if fixed * numbers * bits >= 8 * n * (n + 1) + 64 * lanes:
      return fixed
  return segment.width


def _push_correction(
  message: rans.Message,
  frame: _Frame,
  options: Options,
  table: np.ndarray,
  correction: Any,
) -> rans.Message:
  codec = _code(frame, options).correction_codec(frequencies=jnp.asarray(table))
  return codec.push(message, correction)


def _pop_correction(
  message: rans.Message, frame: _Frame, options: Options, table: np.ndarray
) -> tuple[rans.Message, Any]:
  codec = _code(frame, options).correction_codec(frequencies=jnp.asarray(table))
  return codec.pop(message)


_push_correction = jax.jit(_push_correction, static_argnums=(1, 2))
_pop_correction = jax.jit(_pop_correction, static_argnums=(1, 2))


def _ideal(width: int) -> float:
  """16 bits for each parameter of a rotation."""
  return max(8.0 * width * (width - 1), 1.0)


def _empty(words: int) -> rans.Message:
  lanes = 1 << min(max(words // 8192, 1).bit_length() - 1, 12)
  # Room for sampled bits that are pushed back: no more than there are numbers.
  return rans.empty(lanes, words // lanes * 9 // 8 + 64)


def _room(stream: np.ndarray, lanes: int) -> int:
  """Capacity to decode a stream: rotations are pushed back onto it."""
  return 2 * stream.size // max(lanes, 1) + 64


_ALPHABET = max(layout.alphabet for layout in floats.LAYOUTS.values())


def _padded(rows: list[np.ndarray]) -> np.ndarray:
  padded = [np.pad(row, (0, _ALPHABET - row.size)) for row in rows]
  return np.stack(padded) if padded else np.zeros((0, _ALPHABET), np.int64)
