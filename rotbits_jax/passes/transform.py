"""The algebra of transforms: their definition, and which ones make a chain.

A transform replaces arrays by structured leaves. It keeps the function of the model, or
it notes how it changes it. Transforms are written like Optax's: a few pure functions
and a state, which carries information from layer to layer.

Parameters are dicts of leaves by path, as in `structured.flatten`. **A transform owns
the parameters that it gets**, as a function owns donated buffers: it may change the
dict and return it. So the memory of a leaf is free as soon as it is rewritten.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured

Params = dict[str, Any]  # leaves by path
Note = dict[str, Any]
"""JSON values. Numbers may be arrays `[]`: `rewrite` rounds them to three digits."""
State = Any  # a PyTree of arrays
Noted = tuple[Params, list[Note]]


class Source(Protocol):
  """Arrays in records: a `models.Model`, a checkpoint on disk, or any arrays."""

  @property
  def config(self) -> Any:
    """Config of the model; None for arrays of none."""

  @property
  def stored_as(self) -> str | None:
    """See `models.Model`; None if the arrays are rounded already."""

  @property
  def records(self) -> tuple[str, ...]:
    """Names of the records, see `models.names`, in the order of the file."""

  def specs(self, record: str) -> models.Params:
    """Returns the shapes and dtypes of a record; nothing is read from disk."""

  def read(self, record: str) -> models.Params:
    """Returns the leaves of a record: nested dicts with whole paths."""


class Context(NamedTuple):
  """Information that every function of a transform gets, see `make_context`."""

  source: Source  # the model before any transform
  dtypes: Mapping[str, np.dtype]  # to which parameters are rounded at the end, by path
  dtype: np.dtype  # to which most weights are rounded

  @property
  def config(self) -> models.ModelConfig:
    config: models.ModelConfig = self.source.config
    return config

  def read(self, index: int | None) -> Iterator[models.Params]:
    """Yields a layer of the source; for None, the records outside the layers."""
    if index is None:
      outer = models.outer_shapes(self.config)
      yield from (self.source.read(x) for x in self.source.records if x in outer)
    else:
      name = models.names.layer(index)
      yield self.source.read(name)[name]

  @property
  def roundoff(self) -> float:
    """Unit roundoff of `dtype`, but at least 2^-19, the error of float32 algebra."""
    least = 16 * float(jnp.finfo(jnp.float32).eps)
    return max(float(jnp.finfo(self.dtype).eps) / 2, least)

  def dtype_of(self, path: str) -> np.dtype:
    """Returns the dtype to which a parameter is rounded at the end."""
    return self.dtypes.get(path, self.dtype)

  def narrowest(self, paths: Iterable[str]) -> np.dtype:
    """Returns the one of the dtypes of parameters that has the smallest range."""
    return min(map(self.dtype_of, paths), key=lambda x: float(jnp.finfo(x).max))


def _unchanged(context: Context, state: State, *args: Any) -> Noted:
  """Returns parameters, the last argument, as they are."""
  return args[-1], []


class Transform(NamedTuple):
  """A pass over a model, as functions that return parameters and notes, see `note`.

  >>> [transform.name for transform in chain(Transform('a'), chain(Transform('b')))]
  ['a', 'b']
  """

  name: str  # of its saving in the report
  # Returns the state before the first layer. It may read any part of the source.
  init: Callable[[Context], State] = lambda context: ()
  # Returns the state for the layer with this index, which it does not change.
  advance: Callable[[Context, State, int, Params], State] | None = None
  # Returns the layer with this index, rewritten, and its notes; gets its state.
  layer: Callable[[Context, State, int, Params], Noted] = _unchanged
  # Returns the parameters outside the layers, rewritten; gets the last state.
  outer: Callable[[Context, State, Params], Noted] = _unchanged
  # Whether it reads parts of the source ahead, and so must be the first of a chain.
  reads_source: bool = False
  # 'float32' weights, which are rounded after the last transform, or as they are
  # 'stored' in the source.
  takes: Literal['any', 'float32', 'stored'] = 'any'


Chain = tuple[Transform, ...]


def chain(*transforms: Transform | Chain) -> Chain:
  """Makes a chain of transforms and chains; a ValueError if they do not fit."""
  flat: Chain = ()
  for item in transforms:
    flat += (item,) if isinstance(item, Transform) else item
  for transform in flat[1:]:
    if transform.reads_source:
      raise ValueError(
        f'{transform.name!r} must be the first transform of a chain, because it reads '
        f'the source ahead, got it after {flat[0].name!r}'
      )
  for transform in flat:
    if transform.takes != 'any':
      check_takes(flat, transform.takes)
  return flat


_TAKES = {
  'float32': 'float32 weights, which are rounded after the last transform',
  'stored': 'weights as they are stored',
}


def check_takes(transforms: Chain, takes: str) -> None:
  """Raises a ValueError if a transform does not take such weights."""
  for transform in transforms:
    if transform.takes not in ('any', takes):
      raise ValueError(
        f'{transform.name!r} takes {_TAKES[transform.takes]}, got {_TAKES[takes]}'
      )


def note(
  path: str,  # of the parameter in the whole model
  leaf: Any,  # the array or structured leaf that now stands for it, unstacked
  *,
  error: Any = 0.0,  # relative error of the leaf, in the Frobenius norm
  **details: Any,
) -> Note:
  """Makes a note on one tensor.

  Details are JSON values, or arrays `[]`. An `obstacle` says why the transform did not
  change the tensor; a `plain_error` is the error of plain arrays.
  """
  return {
    'tensor': path,
    'form': leaf.type_name if structured.is_structured(leaf) else 'array',
    'shape': list(leaf.shape),
    **details,
    'elements': structured.count_elements(leaf),
    'error': error,
  }
