"""Fields of structured leaves: the annotations describe their form in a file.

A leaf is a frozen dataclass. Its fields are of two kinds:

    b: Annotated[Any, Array('dk')]     an array of two axes
    columns: Length = static()         a setting, checked by `system.schema`

Axes with one letter are equally long in all arrays of an unstacked leaf. `store` and
`load` turn such a leaf into settings and arrays and back. `load` takes untrusted input:
it checks the annotations, and the method `check` of the leaf checks the rest. Functions
of this module raise a ValueError for what does not fit.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import typing
from typing import Annotated, Any

import numpy as np

from rotbits_jax.system import host
from rotbits_jax.system import schema

Settings = dict[str, Any]  # JSON values
Arrays = dict[str, np.ndarray]

_CORNER, _STEP = '_corner', '_step'  # of the name of an array
_SMALL = 1 << 24  # entries of a matrix that may be all zeros


@dataclasses.dataclass(frozen=True)
class Array:
  """Annotates an array of a leaf, as in `Annotated[Any, Array('mr')]`."""

  axes: str | None  # a letter for each axis of an unstacked leaf; None for any
  dtype: Any = None  # None for any
  lower: bool = False  # whether entries above the diagonal are zero and not stored
  optional: bool = False  # Orbax cannot save arrays without elements: they are None
  most: int | None = None  # the greatest magnitude of its integers; None for any


Length = Annotated[int, schema.between(0, (1 << 31) - 1)]
"""The length of an axis."""


def static(**options: Any) -> Any:
  """Declares a setting: a hashable field that is no part of the PyTree."""
  return dataclasses.field(metadata={'static': True}, **options)


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Any, Any]]:
  """Returns an `Array` or the annotation of each stored field, and its default."""
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = {}
  for field in dataclasses.fields(cls):
    marks = typing.get_args(hints[field.name])[1:]
    array = next((x for x in marks if isinstance(x, Array)), None)
    fields[field.name] = array or hints[field.name], field.default
  return fields


def arrays_of(leaf: Any) -> Iterator[tuple[str, Array, Any]]:
  """Yields the name, the annotation and the value of each array of a leaf."""
  cls: Any = type(leaf)
  for name, (annotation, _) in _fields(cls).items():
    array = getattr(leaf, name)
    if isinstance(annotation, Array) and array is not None:
      yield name, annotation, array


def store(leaf: Any) -> tuple[Settings, Arrays]:
  """Returns the content of an unstacked leaf in the file: settings and arrays."""
  cls: Any = type(leaf)
  settings = {
    name: schema.dump(getattr(leaf, name))
    for name, (annotation, default) in _fields(cls).items()
    if not isinstance(annotation, Array) and getattr(leaf, name) != default
  }
  arrays = {}
  for name, annotation, array in arrays_of(leaf):
    arrays[name] = np.asarray(array)
    if annotation.lower:
      arrays[f'{name}{_CORNER}'], arrays[name] = split_lower(array)
  for name, array in list(arrays.items()):
    if not leaf.is_in_files and (multiples := divided(array)) is not None:
      arrays[name], arrays[f'{name}{_STEP}'] = multiples
  return settings, arrays


def stored_sizes(leaf: Any) -> list[tuple[np.dtype, int]]:
  """Returns the dtype and the size of each array of `store`, without computing them."""
  size = lambda kind, shape: lower_size(shape) if kind.lower else math.prod(shape)
  return [(np.dtype(x.dtype), size(kind, x.shape)) for _, kind, x in arrays_of(leaf)]


def load(cls: Any, settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
  """Makes an unstacked leaf from its content in a file: the inverse of `store`."""
  settings, arrays = dict(settings), dict(arrays)
  values: dict[str, Any] = {}
  lengths: dict[str, int] = {}
  for name, (annotation, default) in _fields(cls).items():
    if not isinstance(annotation, Array):
      if name in settings or default is dataclasses.MISSING:
        values[name] = schema.load(annotation, _take(settings, name), name)
    elif annotation.optional and name not in arrays:
      values[name] = None
    else:
      values[name] = array = _take_array(annotation, name, arrays)
      for axis, length in zip(annotation.axes or '', array.shape, strict=False):
        if lengths.setdefault(axis, length) != length:
          raise ValueError(f'the axis {axis} of {name!r} is {length}: {array.shape}')
  if unknown := [*settings, *arrays]:
    raise ValueError(f'the leaf has {unknown[0][:40]!r}, which is not known')
  leaf = cls(**values)
  leaf.check()
  return leaf


def _take(values: dict[str, Any], name: str) -> Any:
  """Removes a value."""
  if name not in values:
    raise ValueError(f'{name!r} is missing')
  return values.pop(name)


def _take_array(annotation: Array, name: str, arrays: dict[str, Any]) -> np.ndarray:
  """Removes an array with its step and its corner, and checks it alone."""
  array: np.ndarray = _take(arrays, name)
  if f'{name}{_STEP}' in arrays:
    step = _take_array(Array('', np.float32), f'{name}{_STEP}', arrays)
    with np.errstate(over='ignore'):  # in a damaged file
      array = array * step
  axes, dtype, most = annotation.axes, annotation.dtype, annotation.most
  fits = axes is None or array.ndim == len(axes)
  if not fits or dtype not in (None, array.dtype):
    text = f'{axes!r}, {dtype or "of the leaf"}, got {array.dtype} {array.shape}'
    raise ValueError(f'the array {name!r} must have the axes and the dtype {text}')
  if annotation.optional and not array.size:
    raise ValueError(f'the array {name!r} must have elements, got {array.shape}')
  if most is not None and np.abs(array.astype(np.int64)).max(initial=0) > most:
    raise ValueError(f'the elements of {name!r} must be at most {most}')
  if annotation.lower:
    corner = _take_array(Array('n'), f'{name}{_CORNER}', arrays)
    array = join_lower(corner, array)
  return array


# ---- triangles -----------------------------------------------------------------------
#
# A lower trapezoidal matrix is a packed corner and the other rows. The corner is the
# first rows, as many as the matrix has columns, or all rows if these are fewer. It is
# packed: only the entries on and below the diagonal are kept, row by row.


def lower_size(shape: tuple[int, ...]) -> int:
  """Returns how many entries `[rows, columns]` has on and below the diagonal."""
  rows, columns = shape[-2:]
  corner = min(rows, columns)
  return corner * (corner + 1) // 2 + (rows - corner) * columns


def split_lower(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
  """Returns the packed corner `[n (n + 1) / 2]` and the other rows `[r, columns]`."""
  matrix = np.asarray(matrix)
  n = min(matrix.shape)
  return matrix[:n, :n][np.tri(n, dtype=np.bool)], matrix[n:]


def join_lower(corner: np.ndarray, below: np.ndarray) -> np.ndarray:
  """Makes a lower trapezoidal matrix: the inverse of `split_lower`.

  Few elements of untrusted input must not ask for much memory. So the matrix must not
  be far larger than its parts.
  """
  n, (rows, columns) = (math.isqrt(8 * corner.size + 1) - 1) // 2, below.shape
  fits = n == columns or (n < columns and not rows)
  if n * (n + 1) // 2 != corner.size or not fits or corner.dtype != below.dtype:
    raise ValueError(f'no triangle has {corner.size} numbers above {below.shape=}')
  rows += n
  # A square one has twice as many; a kernel may have fewer outputs than inputs.
  if rows * columns > 16 * (corner.size + below.size) + _SMALL:
    raise ValueError(f'{corner.size} numbers are too few for {rows} x {columns}')
  matrix = host.empty((rows, columns), corner.dtype)
  matrix[:n], matrix[n:] = 0, below
  matrix[:n, :n][np.tri(n, dtype=np.bool)] = corner
  return matrix


# ---- arrays of float32 multiples of one step -----------------------------------------

_MOST_INTEGER = 1 << 15
_LEAST = 1 << 8  # elements of an array whose step is worth its place in a file


def divided(array: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns the integers, int16, and the step of float32 multiples of a step.

  The step is the least magnitude. The result is None if a product is another number.
  """
  if array.dtype != np.float32 or array.size < _LEAST:
    return None
  sizes = np.abs(array)
  step = sizes.min(initial=np.inf, where=sizes > 0)
  # Comparisons with NaN are false.
  if not sizes.max() < _MOST_INTEGER * step or np.isinf(step):
    return None
  integers = np.rint(array / step).astype(np.int16)
  products = (integers * step).view(np.uint32)
  is_same = np.array_equal(products, array.view(np.uint32))
  return (integers, np.asarray(step)) if is_same else None
