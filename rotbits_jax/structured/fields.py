"""Fields of structured leaves: the annotations describe their form in a file.

A leaf is a `flax.struct` dataclass. Its fields are of two kinds:

    b: Lower                           an array, annotated by an `Array`
    columns: Length = static()         a setting, checked by `system.schema`

`store` and `load` turn an unstacked leaf into settings and arrays and back. `load`
takes untrusted input: it checks the annotations, and the method `check` of the leaf
checks how its fields fit together.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import typing
from typing import Annotated, Any

from flax import struct
import numpy as np

from rotbits_jax.structured import steps
from rotbits_jax.structured import triangles
from rotbits_jax.system import schema

Settings = dict[str, Any]  # JSON values
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Array:
  """Annotates an array of a leaf, as in `Annotated[Any, Array(2)]`.

  Attributes:
    axes: number of axes, if the leaf is unstacked; None for any.
    dtype: dtype of the array; None for any.
    lower: whether the entries above the diagonal of a matrix are zero and not stored.
    optional: whether None stands for an array without elements, which Orbax cannot
      save.
  """

  axes: int | None
  dtype: Any = None
  lower: bool = False
  optional: bool = False


Length = Annotated[int, schema.between(0, (1 << 31) - 1)]
"""The length of an axis."""

Matrix = Annotated[Any, Array(2)]
Lower = Annotated[Any, Array(2, lower=True)]
"""A matrix whose entries above the diagonal are zero."""


def static(**options: Any) -> Any:
  """Declares a setting: a hashable field that is no part of the PyTree."""
  return struct.field(pytree_node=False, **options)


def of_stacks() -> Any:
  """Declares a setting that only stacked leaves have, and a file does not store."""
  return struct.field(pytree_node=False, default=None, metadata={'stored': False})


@functools.cache
def _fields(cls: Any) -> tuple[tuple[str, Any], ...]:
  """Returns the names of stored fields, and an `Array` or the setting's annotation."""
  hints = typing.get_type_hints(cls, include_extras=True)
  found = []
  for field in dataclasses.fields(cls):
    if field.metadata.get('stored', True):
      marks = typing.get_args(hints[field.name])[1:]
      array = next((x for x in marks if isinstance(x, Array)), None)
      found.append((field.name, array or hints[field.name]))
  return tuple(found)


@functools.cache
def _default(cls: Any, name: str) -> Any:
  """Returns the default of a setting, which a file does not store."""
  return next(x.default for x in dataclasses.fields(cls) if x.name == name)


def _arrays(leaf: Any) -> Iterator[tuple[str, Array, Any]]:
  """Yields the name, the annotation and the value of each array of a leaf."""
  cls: Any = type(leaf)
  for name, annotation in _fields(cls):
    array = getattr(leaf, name)
    if isinstance(annotation, Array) and array is not None:
      yield name, annotation, array


def store(leaf: Any) -> tuple[Settings, Arrays]:
  """Returns the settings and arrays of an unstacked leaf."""
  cls: Any = type(leaf)
  settings = {
    name: schema.dump(getattr(leaf, name))
    for name, annotation in _fields(cls)
    if not isinstance(annotation, Array) and getattr(leaf, name) != _default(cls, name)
  }
  arrays = {}
  for name, annotation, array in _arrays(leaf):
    arrays[name] = np.asarray(array)
    if annotation.lower:
      arrays[f'{name}{_CORNER}'], arrays[name] = triangles.split_lower(array)
  for name, array in list(arrays.items()):
    if (divided := steps.divide(array)) is not None:
      arrays[name], arrays[f'{name}{_STEP}'] = divided
  return settings, arrays


def stored_sizes(leaf: Any) -> list[tuple[np.dtype, int]]:
  """Returns the dtype and the size of each array of `store`, without computing them."""
  return [
    (
      np.dtype(array.dtype),
      triangles.lower_size(array.shape) if annotation.lower else math.prod(array.shape),
    )
    for _, annotation, array in _arrays(leaf)
  ]


def load(cls: Any, settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
  """Makes a leaf from its settings and arrays: the inverse of `store`.

  Raises:
    ValueError: if something is missing, unknown, or not as the annotations and `check`
      say.
  """
  settings, arrays = dict(settings), dict(arrays)
  found: dict[str, Any] = {}
  for name, annotation in _fields(cls):
    if not isinstance(annotation, Array):
      if name in settings or _default(cls, name) is dataclasses.MISSING:
        found[name] = schema.load(annotation, _take(settings, name), name)
    elif annotation.optional and name not in arrays:
      found[name] = None
    else:
      found[name] = _take_array(annotation, name, arrays)
  if unknown := [*settings, *arrays]:
    raise ValueError(f'the leaf has {unknown[0][:40]!r}, which is not known')
  leaf = cls(**found)
  leaf.check()
  return leaf


def _take(given: dict[str, Any], name: str) -> Any:
  if name not in given:
    raise ValueError(f'{name!r} is missing')
  return given.pop(name)


def _take_array(annotation: Array, name: str, arrays: dict[str, Any]) -> np.ndarray:
  array: np.ndarray = _take(arrays, name)
  if f'{name}{_STEP}' in arrays:
    step = _take_array(_STEPS, f'{name}{_STEP}', arrays)
    with np.errstate(over='ignore'):  # in a damaged file
      array = array * step
  axes = annotation.axes if annotation.axes is not None else array.ndim
  if array.ndim != axes or annotation.dtype not in (None, array.dtype):
    raise ValueError(
      f'the array {name!r} must have {annotation.axes} axes and the dtype '
      f'{annotation.dtype or "of the leaf"}, got {array.dtype} {array.shape}'
    )
  if annotation.optional and not array.size:
    raise ValueError(f'the array {name!r} must have elements, got {array.shape}')
  if annotation.lower:
    corner = _take_array(_CORNERS, f'{name}{_CORNER}', arrays)
    array = triangles.join_lower(corner, array)
  return array


_CORNER = '_corner'  # of the name of an array
_CORNERS = Array(1)
_STEP = '_step'
_STEPS = Array(0, np.float32)
