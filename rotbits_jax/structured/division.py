"""Programs that divide elements beside known ones, see `relative.Relative`.

They divide elements into classes, symbols and raw bits, and join these again, a part
that stays in a cache at a time. Dtypes of one size share programs. Arrays that are
returned are used again by the next call on this thread.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.coding import given
from rotbits_jax.system import native

_STEP = 1 << 12  # elements that one step of a program takes
_UNROLLED = 16  # elements that one step counts
_LOG2_OCTAVE = 2  # of the levels of an octave
_BITS = 3  # the octaves of a difference that the symbols of an encoder tell


class Kind(NamedTuple):
  """What programs know of a dtype.

  Attributes:
    mantissa: the bits of the mantissa; those that are not the sign if the dtype has no
      exponents.
    floats: -1 for floats, 0 for integers.
  """

  mantissa: np.ndarray
  floats: np.ndarray

  @classmethod
  def of(cls, dtype: np.dtype, mantissa: int | None) -> 'Kind':
    kind = np.dtype(f'i{dtype.itemsize}').type
    bits = 8 * dtype.itemsize - 1 if mantissa is None else mantissa
    return cls(kind(bits), kind(0 if dtype.kind in 'iub' else -1))


class Sums(NamedTuple):
  """The sums of the scales of rows and columns, int16.

  Attributes:
    rows: `[R]`.
    columns: `[C]`.
  """

  rows: np.ndarray
  columns: np.ndarray

  def write(self, start: int, out: np.ndarray) -> None:
    """Writes the sums of the elements from the index `start` on."""
    width = self.columns.size
    row, column = divmod(start, width)
    ahead = min(-column % width, out.size)  # elements of a row that began before
    out[:ahead] = self.columns[column : column + ahead] + self.rows[row]
    row += column > 0
    whole = (out.size - ahead) // width
    end = ahead + whole * width
    some = self.rows[row : row + whole, None]
    np.add(some, self.columns, out=out[ahead:end].reshape(whole, width))
    if end < out.size:
      out[end:] = self.columns[: out.size - end] + self.rows[row + whole]


class Divided(NamedTuple):
  """Some elements, divided.

  Attributes:
    classes: uint8 `[n]`.
    symbols: uint8 `[n]`.
    raw: uint16 or uint32 `[n]`, the raw bits.
    counts: int32 `[256, 256]`, how often a class has a symbol.
  """

  classes: np.ndarray
  symbols: np.ndarray
  raw: np.ndarray
  counts: np.ndarray


def shifts_of(levels: Any, width: int) -> Any:
  """Returns the shifts that an encoder chooses for levels.

  Args:
    levels: signed integers.
    width: bits of the dtype.
  """
  return ((levels >> _LOG2_OCTAVE) - _BITS).clip(0, width - 8)


def divide(
  bits: np.ndarray,
  known: np.ndarray,
  sums: Callable[[np.ndarray], None],
  kind: Kind,
  first: int,
  last: int,
) -> Divided:
  """Divides a block of elements.

  Args:
    bits: bits of the elements, signed integers `[n]`; n is at most 2^20.
    known: the bits that predict them, `[n]`.
    sums: writes the sums of scales, minus `2 first`.
    kind: of their dtype.
    first: the level of class 0.
    last: the class of the highest level; its elements are stored alone.
  """
  raw = np.promote_types(f'u{bits.itemsize}', np.uint16)
  out, counts = _divide(
    _taken({'classes': np.uint8, 'symbols of bytes': np.uint8, 'raw': raw}),
    buffers.taken('counts', 1 << 16, np.int32),
    (_copied('elements', bits), _copied('known', known), _filled(sums, bits.size)),
    kind,
    np.int16(first),
    np.int16(last),
    np.int32(bits.size),
  )
  _keep(('classes', 'symbols of bytes', 'raw'), out)
  buffers.keep('counts', counts)
  classes, symbols, own = (np.asarray(x)[: bits.size] for x in out)
  return Divided(classes, symbols, own, np.asarray(counts).reshape(256, 256))


def join(
  known: np.ndarray,
  sums: Callable[[np.ndarray], None],
  kind: Kind,
  of_classes: np.ndarray,
  shifts: np.ndarray,
  pop: given.Pop,
) -> tuple[np.ndarray, np.ndarray]:
  """Joins the elements of a block: the inverse of `divide`.

  Args:
    known: as in `divide`.
    sums: as in `divide`.
    kind: as in `divide`.
    of_classes: the band of each class, uint8.
    shifts: the shift of each band, uint8.
    pop: takes the bands of the elements, see `given.decode`.

  Returns:
    The bits of the elements, and the indices of those of the symbol 0.
  """
  size = known.size
  table = np.zeros(256, np.uint16)
  table[: of_classes.size] = of_classes | shifts[of_classes].astype(np.uint16) << 8
  known = _copied('known', known)
  bands, own = _bands(
    _taken({'bands': np.uint8, 'shifts': np.uint8}),
    (known, _filled(sums, size)),
    kind,
    table,
    np.int16(of_classes.size - 1),
    np.int32(size),
  )
  symbols, at, bits = pop(np.asarray(bands)[:size])
  raw = np.promote_types(f'u{known.itemsize}', np.uint16)
  places = buffers.scratch('raw bits', buffers.ROOM, raw)
  places[at] = bits
  (found,) = _join(
    _taken({'joined': known.dtype}),
    (symbols, bands, own, places, known),
    kind,
    np.uint8(shifts.size - 1),
    np.int32(size),
  )
  _keep(('bands', 'shifts', 'joined'), (bands, own, found))
  return np.asarray(found)[:size], np.flatnonzero(symbols[:size] == 0)


def _taken(names: Mapping[str, Any]) -> tuple[jax.Array, ...]:
  return tuple(
    buffers.taken(name, buffers.ROOM, dtype) for name, dtype in names.items()
  )


def _keep(names: tuple[str, ...], arrays: tuple[jax.Array, ...]) -> None:
  for name, array in zip(names, arrays, strict=True):
    buffers.keep(name, array)


def _copied(name: str, array: np.ndarray) -> np.ndarray:
  found = buffers.scratch(name, buffers.ROOM, array.dtype)
  found[: array.size] = array
  return found


def _filled(fill: Callable[[np.ndarray], None], size: int) -> np.ndarray:
  found = buffers.scratch('sums', buffers.ROOM, np.int16)
  fill(found[:size])
  return found


# ---- programs ------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _divide(
  out: tuple[jax.Array, ...],
  counts: jax.Array,
  elements: tuple[jax.Array, ...],
  kind: Kind,
  first: jax.Array,
  last: jax.Array,
  count: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  def step(
    bits: jax.Array, known: jax.Array, sums: jax.Array, *others: Any
  ) -> tuple[jax.Array, ...]:
    kind, first, last = others
    width, unsigned = 8 * bits.itemsize, jnp.dtype(f'u{bits.itemsize}')
    wide = jnp.promote_types(unsigned, jnp.uint16)
    signed = jnp.promote_types(bits.dtype, jnp.int16)
    classes = _classes(known, sums, kind, last)
    is_last, sign, one = classes == last, _sign(known, kind), jnp.ones((), wide)
    far = (_flipped(bits ^ sign, kind) - (known ^ sign)).astype(signed)
    own = bits.view(unsigned)
    own = (own << 1 | own >> width - 1).astype(wide)
    shifts = shifts_of(classes + first, width)
    shifts = jnp.where(is_last, jnp.int16(width - 8), shifts).astype(signed)
    raw = jnp.where(is_last, own, far.view(wide)) & (one << shifts.view(wide)) - one
    top = jnp.where(is_last, own >> width - 8, ((far >> shifts) + 128).view(wide))
    symbols = jnp.where(top < 256, top, 0).astype(jnp.uint8)
    return classes.astype(jnp.uint8), symbols, raw

  return _looped(step, out, counts, elements, (kind, first, last), count)


@functools.partial(jax.jit, donate_argnums=0)
def _bands(
  out: tuple[jax.Array, ...],
  elements: tuple[jax.Array, ...],
  kind: Kind,
  table: jax.Array,
  last: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, ...]:
  def step(known: jax.Array, sums: jax.Array, *others: Any) -> tuple[jax.Array, ...]:
    kind, table, last = others
    # The compiler sees that 8 bits cannot be beyond the table, and checks nothing.
    classes = _classes(known, sums, kind, last).astype(jnp.uint8)
    both = table.at[classes].get(mode='promise_in_bounds')
    return both.astype(jnp.uint8), (both >> 8).astype(jnp.uint8)

  return _looped(step, out, None, elements, (kind, table, last), count)[0]


@functools.partial(jax.jit, donate_argnums=0)
def _join(
  out: tuple[jax.Array, ...],
  elements: tuple[jax.Array, ...],
  kind: Kind,
  last: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, ...]:
  def step(
    symbols: jax.Array,
    bands: jax.Array,
    shifts: jax.Array,
    raw: jax.Array,
    known: jax.Array,
    *others: Any,
  ) -> tuple[jax.Array, ...]:
    kind, last = others
    width, unsigned = 8 * known.itemsize, jnp.dtype(f'u{known.itemsize}')
    shifts, one, sign = (
      shifts.astype(raw.dtype),
      jnp.ones((), raw.dtype),
      _sign(known, kind),
    )
    numbers = symbols.astype(raw.dtype) << shifts | raw & (one << shifts) - one
    far = (numbers - (one << shifts + 7)).astype(unsigned).view(known.dtype)
    own = numbers.astype(unsigned)
    own = (own >> 1 | own << width - 1).view(known.dtype)
    moved = _flipped(far + (known ^ sign), kind) ^ sign
    return (jnp.where(bands == last, own, moved),)

  return _looped(step, out, None, elements, (kind, last), count)[0]


def _looped(
  step: Callable[..., tuple[jax.Array, ...]],
  out: tuple[jax.Array, ...],
  counts: jax.Array | None,
  elements: tuple[jax.Array, ...],
  others: tuple[Any, ...],
  count: jax.Array,
) -> Any:
  """Writes the results of a function, of parts of the elements, into `out`.

  Args:
    step: takes a part of each array of elements, and `others`.
    out: arrays that are written.
    counts: is written too: how often each class has each symbol. May be None.
    elements: arrays `[2^20]`.
    others: arrays of any shapes.
    count: the number of elements.
  """

  def loop(out: Any, counts: Any, elements: Any, others: Any, count: Any) -> Any:
    def body(i: jax.Array, carry: Any) -> Any:
      out, counts = carry
      start = (i * _STEP,)
      found = step(
        *(jax.lax.dynamic_slice(x, start, (_STEP,)) for x in elements), *others
      )
      if counts is not None:
        counts = _counted(counts, found[0], found[1], count - i * _STEP)
      pairs = zip(out, found, strict=True)
      return [jax.lax.dynamic_update_slice(x, y, start) for x, y in pairs], counts

    counts = None if counts is None else jnp.zeros_like(counts)
    return jax.lax.fori_loop(0, -(-count // _STEP), body, (list(out), counts))

  return native.loop(loop)(out, counts, elements, others, count)


def _counted(
  counts: jax.Array, classes: jax.Array, symbols: jax.Array, size: jax.Array
) -> jax.Array:
  """Counts the symbols of the first elements."""
  # The compiler sees that 16 bits cannot be beyond the counts, and checks none.
  index = classes.astype(jnp.uint16) << 8 | symbols.astype(jnp.uint16)
  index = jnp.where(jnp.arange(_STEP) < size, index, jnp.uint16(counts.size - 1))

  def step(i: jax.Array, counts: jax.Array) -> jax.Array:
    for j in jax.lax.dynamic_slice(index, (i * _UNROLLED,), (_UNROLLED,)):
      at = (j.astype(jnp.int32),)
      one = jax.lax.dynamic_slice(counts, at, (1,)) + 1
      counts = jax.lax.dynamic_update_slice(counts, one, at)
    return counts

  return jax.lax.fori_loop(0, _STEP // _UNROLLED, step, counts)


def _classes(known: jax.Array, sums: jax.Array, kind: Kind, last: Any) -> jax.Array:
  """Returns the classes of elements, int16."""
  exponents = (known & jnp.iinfo(known.dtype).max) >> kind.mantissa
  level = sums - (jnp.maximum(exponents, 1).astype(jnp.int16) << 3)
  return jnp.clip(level >> 1, 0, last)


def _sign(known: jax.Array, kind: Kind) -> jax.Array:
  return known & jnp.iinfo(known.dtype).min & kind.floats


def _flipped(bits: jax.Array, kind: Kind) -> jax.Array:
  """Returns ULP indices, as `ulps.index` does."""
  most = jnp.iinfo(bits.dtype).max
  return bits ^ (bits >> 8 * bits.itemsize - 1 & most & kind.floats)
