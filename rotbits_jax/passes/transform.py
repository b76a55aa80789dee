"""The algebra of transforms: their definition, and which ones make a chain.

A transform replaces arrays by structured leaves. It keeps the function of the model, or
it notes how it changes it. Transforms are written like Optax's: a few pure functions
and a state, which carries information from layer to layer.

Parameters are dicts of leaves by path, as in `structured.flatten`. **A transform owns
the parameters that it gets**, as a function owns donated buffers: it may change the
dict and return it. So the memory of a leaf is free as soon as it is rewritten.
"""

from collections.abc import Callable, Mapping
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


class ModelSource(Protocol):
  """A model to read from: a `models.Model`, or a checkpoint that stays on disk."""

  @property
  def config(self) -> models.ModelConfig: ...

  @property
  def records(self) -> tuple[str, ...]:
    """Names of the records, see `models.names`."""

  def read(self, record: str) -> models.Params:
    """The parameters of a record, by whole paths."""

  def specs(self, record: str) -> models.Params:
    """The shapes and dtypes of the parameters of a record, by whole paths."""

  def outer(self) -> models.Params:
    """The parameters outside the layers."""


class Context(NamedTuple):
  """Information that every function of a transform gets, see `make_context`."""

  source: ModelSource  # the model before any transform
  dtypes: Mapping[str, np.dtype]  # to which parameters are rounded at the end, by path
  dtype: np.dtype  # to which most weights are rounded

  @property
  def config(self) -> models.ModelConfig:
    return self.source.config

  @property
  def roundoff(self) -> float:
    """Unit roundoff of `dtype`, but at least 2^-19, the error of float32 algebra."""
    least = 16 * float(jnp.finfo(jnp.float32).eps)
    return max(float(jnp.finfo(self.dtype).eps) / 2, least)

  def holder(self, *paths: str) -> np.dtype:
    """Returns the dtype of parameters; of several, the one with the smallest range."""
    dtypes = [self.dtypes.get(path, self.dtype) for path in paths]
    return min(dtypes, key=lambda dtype: float(jnp.finfo(dtype).max))


class Transform(NamedTuple):
  """A pass over a model, as functions that return parameters and notes, see `note`.

  >>> [transform.name for transform in chain(Transform('a'), chain(Transform('b')))]
  ['a', 'b']

  Attributes:
    name: the name of its saving in the report.
    init: takes the context; returns the state before the first layer. It may read any
      part of the source.
    advance: takes the context, the state, the index of a layer and the layer, which it
      does not change; returns the state for this layer. None if the state is constant.
    layer: takes the same arguments, with the state of this layer; returns the rewritten
      layer and its notes.
    outer: takes the context, the last state and the parameters outside the layers;
      returns them rewritten, and the notes.
    reads_source: whether it reads parts of the source before they are rewritten, and so
      must be the first of a chain.
    takes: 'float32' if weights must be float32 and are rounded after the last
      transform; 'stored' if they must be those of the source, in its dtypes.
  """

  name: str
  init: Callable[[Context], State] = lambda context: ()
  advance: Callable[[Context, State, int, Params], State] | None = None
  layer: Callable[[Context, State, int, Params], Noted] = (
    lambda context, state, index, params: (params, [])
  )
  outer: Callable[[Context, State, Params], Noted] = lambda context, state, params: (
    params,
    [],
  )
  reads_source: bool = False
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


def note(path: str, leaf: Any, *, error: Any = 0.0, **details: Any) -> Note:
  """Makes a note on one tensor.

  Args:
    path: path of the parameter in the whole model.
    leaf: the array or structured leaf that now stands for the parameter, unstacked.
    error: relative error of the leaf, in the Frobenius norm.
    details: further JSON values, or arrays `[]`. An `obstacle` says why the transform
      did not change the tensor; a `plain_error` is the error of plain arrays.
  """
  return {
    'tensor': path,
    'form': leaf.type_name if structured.is_structured(leaf) else 'array',
    'shape': list(leaf.shape),
    **details,
    'elements': structured.count_elements(leaf),
    'error': error,
  }
