"""The algebra of transforms: their definition, and which ones make a chain.

A transform rewrites the parameters of a model so that they store fewer numbers. It
replaces arrays by structured leaves, which store fewer numbers than the arrays that
they stand for; see `structured`. It keeps the function of the model, or it states how
it changes the function. A note describes the change of one tensor.

Transforms are written like Optax's: a transform is a few pure functions and a state.
The state carries information from layer to layer, for example the coordinates that were
chosen for the residual stream.

Parameters are dicts of leaves by path, as in `structured.flatten`. **A transform owns
the parameters that it gets**, as a function owns donated buffers: it may take leaves
out of a dict, put others in, and return the same dict. So the memory of a leaf is free
as soon as it is rewritten.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import devices

Params = dict[str, Any]  # leaves by path
Note = dict[str, Any]
"""JSON values. Numbers may be arrays `[]`: `rewrite` rounds them to three digits."""
State = Any  # a PyTree of arrays
Noted = tuple[State, list[Params], list[list[Note]]]

MOST_ERROR = 8.0
"""The greatest relative error that a note may state, as a multiple of the roundoff.

A note with `plain_error`, the error that plain arrays would have, may state as many
times that error.
"""


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
  """Information that every function of a transform gets, see `make_context`.

  Attributes:
    source: the model before any transform.
    dtypes: the dtype to which the numbers of each parameter are rounded at the end, by
      path.
    dtype: the dtype to which most numbers are rounded.
    mesh: devices along one axis, 'layers', that share the layers; None for one device.
    held: the dtypes that must hold the numbers, by path; None for `dtypes`.
  """

  source: ModelSource
  dtypes: Mapping[str, np.dtype]
  dtype: np.dtype
  mesh: jax.sharding.Mesh | None = None
  held: Mapping[str, np.dtype] | None = None

  @property
  def config(self) -> models.ModelConfig:
    return self.source.config

  @property
  def roundoff(self) -> float:
    """Unit roundoff of `dtype`, the dtype of most numbers.

    For float32 it is 2^-19, the error of the float32 linear algebra, because float32's
    own roundoff is never reached.
    """
    least = 16 * float(jnp.finfo(jnp.float32).eps)
    return max(float(jnp.finfo(self.dtype).eps) / 2, least)

  def widened(self) -> 'Context':
    """Returns the context with which numbers stay float32 at the end.

    By `held` the transforms see the same limits, so that they do the same.
    """
    wide = {
      path: np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
      for path, dtype in self.dtypes.items()
    }
    return self._replace(dtypes=wide, held=self.held or self.dtypes)

  def holder(self, *paths: str) -> np.dtype:
    """Returns the dtype that must hold parameters: the one with the smallest range."""
    own = {path: (self.held or self.dtypes).get(path, self.dtype) for path in paths}
    return min(own.values(), key=lambda dtype: float(jnp.finfo(dtype).max))

  def limit(self, path: str) -> float:
    """Returns the greatest finite number of the dtype that must hold a parameter."""
    return float(jnp.finfo(self.holder(path)).max)

  def map_layers(
    self, core: devices.Core, arguments: Sequence[tuple[Any, ...]], **static: Any
  ) -> list[Any]:
    """Applies a pure function of one layer to several, see `devices.map_layers`."""
    return devices.map_layers(self.mesh, core, arguments, **static)


class Transform(NamedTuple):
  """A pass over a model, as functions that return notes, see `note`.

  >>> chain(Transform('a'), chain(Transform('b'))).names
  ('a', 'b')

  Attributes:
    name: the name of its saving in the report.
    init: takes the context and returns the state before the first layer. It may read
      any part of the source. By default the state is empty.
    layers: takes the context, the state, the index of the first layer and consecutive
      layers. It returns the next state, the rewritten layers, and the notes on each
      layer. By default nothing changes.
    outer: takes the context, the state after the last layer and the parameters outside
      the layers. It returns the rewritten parameters and the notes.
    skip: takes the arguments of `layers` and returns the next state only. By default it
      is `layers`, as it is before transforms that have a state, too.
    reads_source: whether it reads parts of the source before they are rewritten, and so
      must be the first of a chain.
    takes: the numbers that it takes: 'float32' if they must be float32 and are rounded
      after the last transform, 'stored' if they must be those of the source, in its
      dtypes.
    most_error: the greatest relative error that its notes may state, if it changes the
      function; by default `MOST_ERROR` limits them. A greater error ends the work.
    carries_adapters: whether it takes the factors of an adapter, which are beside their
      kernel at `models.layout.adapter_of`, to the coordinates of the rewritten kernel.
      Without it, a chain is refused where a model has adapters.
  """

  name: str
  init: Callable[[Context], State] = lambda context: ()
  layers: Callable[[Context, State, int, list[Params]], Noted] = (
    lambda context, state, first, layers: (state, layers, [[] for _ in layers])
  )
  outer: Callable[[Context, State, Params], tuple[Params, list[Note]]] = (
    lambda context, state, params: (params, [])
  )
  skip: Callable[[Context, State, int, list[Params]], State] | None = None
  reads_source: bool = False
  takes: Literal['any', 'float32', 'stored'] = 'any'
  most_error: float | None = None
  carries_adapters: bool = False


class Chain(NamedTuple):
  """Transforms that are applied in order, see `chain`."""

  transforms: tuple[Transform, ...]

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(transform.name for transform in self.transforms)

  def init(self, context: Context) -> tuple[State, ...]:
    """Returns the state of each transform before the first layer."""
    return tuple(transform.init(context) for transform in self.transforms)

  def check(self, takes: str) -> None:
    """Checks that every transform takes such numbers, see `Transform.takes`.

    Raises:
      ValueError: if one does not. It names the transform.
    """
    for transform in self.transforms:
      if transform.takes not in ('any', takes):
        kinds = {
          'float32': 'float32 numbers, which are rounded after the last transform',
          'stored': 'numbers as they are stored',
        }
        raise ValueError(
          f'{transform.name!r} takes {kinds[transform.takes]}, got {kinds[takes]}'
        )


def chain(*transforms: Transform | Chain) -> Chain:
  """Makes a chain of transforms; a chain among them counts as its transforms.

  Raises:
    ValueError: if a transform that reads the source ahead is not the first, or if two
      transforms take different numbers. It names the transforms.
  """
  found: list[Transform] = []
  for transform in transforms:
    found += transform.transforms if isinstance(transform, Chain) else [transform]
  for before, transform in itertools.pairwise(found):
    if transform.reads_source:
      raise ValueError(
        f'{transform.name!r} must be the first transform of a chain, because it reads '
        f'the source ahead, got it after {before.name!r}'
      )
  made = Chain(tuple(found))
  for transform in found:
    if transform.takes != 'any':
      made.check(transform.takes)
  return made


def note(path: str, leaf: Any, *, error: Any = 0.0, **details: Any) -> Note:
  """Makes a note on one tensor.

  Args:
    path: path of the parameter in the whole model.
    leaf: the array or structured leaf that now stands for the parameter, unstacked.
    error: relative error of the leaf, in the Frobenius norm.
    details: further JSON values, or arrays of shape `[]`. An `obstacle` says why the
      transform did not change the tensor.
  """
  return {
    'tensor': path,
    'form': leaf.type_name if structured.is_structured(leaf) else 'array',
    'shape': list(leaf.shape),
    **details,
    'elements': structured.count_elements(leaf),
    'error': error,
  }
