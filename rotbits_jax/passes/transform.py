"""The algebra of transforms: what a transform is, and how several make one.

A transform rewrites the parameters of a model so that they store fewer numbers. It
replaces arrays by structured leaves, which store fewer numbers than the arrays that
they stand for; see `structured`. It keeps the function of the model, or it states how
it changes the function.

Transforms are written like Optax's: a transform is a few pure functions and a state.
The state carries information from layer to layer, for example the coordinates that were
chosen for the residual stream. `make` builds a transform, `chain` makes one transform
from several, and `rewrite` applies it to a model.

Parameters are dicts of leaves by path, as in `structured.flatten`. **A transform owns
the parameters that it gets**, as a function owns donated buffers: it may take leaves
out of a dict, put others in, and return the same dict. So the memory of a leaf is free
as soon as it is rewritten.

A saving is the count of numbers and bytes that a transform removed. A note says what a
transform did to one tensor.
"""

from collections.abc import Callable, Mapping, Sequence
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

A note with `plain_error` may state as many times that error: the error that plain
arrays would have. A greater error ends the work, see `Transform.most_error`.
"""


class Source(Protocol):
  """A model to read from: a `models.Model`, or a checkpoint that stays on disk."""

  @property
  def config(self) -> models.ModelConfig: ...

  def outer(self) -> models.Params:
    """The parameters outside the layers."""

  def layer(self, index: int) -> models.Params:
    """The parameters of one layer, unstacked."""

  def specs(self, index: int | None) -> models.Params:
    """The shapes and dtypes of `layer(index)`, or of `outer()` for None."""


class Context(NamedTuple):
  """Information that every function of a transform gets, see `make_context`.

  Attributes:
    source: the model before any transform.
    dtypes: the dtype to which the numbers of each parameter are rounded at the end, by
      path.
    dtype: the dtype to which most numbers are rounded.
    mesh: devices along one axis, 'layers', that share the layers; None for one device.
  """

  source: Source
  dtypes: Mapping[str, np.dtype]
  dtype: np.dtype
  mesh: jax.sharding.Mesh | None = None

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

  def limit(self, path: str) -> float:
    """Returns the greatest finite number of the dtype of a parameter."""
    return float(jnp.finfo(self.dtypes[path]).max)

  def map_layers(
    self, core: devices.Core, arguments: Sequence[tuple[Any, ...]], **static: Any
  ) -> list[Any]:
    """Applies a pure function of one layer to several, see `devices.map_layers`."""
    return devices.map_layers(self.mesh, core, arguments, **static)


class Saving(NamedTuple):
  """The numbers and bytes that one transform removed from one record.

  Attributes:
    name: name of the transform.
    numbers: how many numbers fewer are stored; negative if there are more.
    bytes: how many bytes fewer those numbers take before they are coded.
    notes: notes on the tensors of the record.
  """

  name: str
  numbers: int
  bytes: int
  notes: list[Note]


Takes = Literal['any', 'float32', 'stored']


class Transform(NamedTuple):
  """One step of a chain. `make` builds one from functions that return notes.

  Attributes:
    names: the names of its savings in the report, in order; a chain has several.
    init: takes the context and returns the state before the first layer. It may read
      any part of the source.
    layers: takes the context, the state, the index of the first layer and consecutive
      layers. It returns the next state, the rewritten layers, and the savings of each
      layer.
    outer: takes the context, the state after the last layer and the parameters outside
      the layers. It returns the rewritten parameters and their savings.
    skip: takes the arguments of `layers` and returns the next state only.
    reads_source: the name of the transform in it that reads parts of the source before
      they are rewritten, and so must be the first of a chain; '' if there is none.
    takes: the numbers that it takes: 'float32' if they must be float32 and are rounded
      after the last transform, 'stored' if they must be those of the source, in its
      dtypes.
    taker: the name of the transform in it for which `takes` holds.
    most_error: the greatest relative error that notes of a transform may state, by its
      name, for transforms that change the function; see `MOST_ERROR` for the others.
  """

  names: tuple[str, ...]
  init: Callable[[Context], State]
  layers: Callable[
    [Context, State, int, list[Params]], tuple[State, list[Params], list[list[Saving]]]
  ]
  outer: Callable[[Context, State, Params], tuple[Params, list[Saving]]]
  skip: Callable[[Context, State, int, list[Params]], State]
  reads_source: str = ''
  takes: Takes = 'any'
  taker: str = ''
  most_error: tuple[tuple[str, float], ...] = ()


def make(
  name: str,
  *,
  init: Callable[[Context], State] = lambda context: (),
  layers: Callable[[Context, State, int, list[Params]], Noted] | None = None,
  outer: Callable[[Context, State, Params], tuple[Params, list[Note]]] | None = None,
  skip: Callable[[Context, State, int, list[Params]], State] | None = None,
  reads_source: bool = False,
  takes: Takes = 'any',
  most_error: float | None = None,
) -> Transform:
  """Makes a transform from functions that return notes, see `Transform` and `note`.

  >>> make('nothing').names
  ('nothing',)

  Args:
    name: name of the saving in the report.
    init: as in `Transform`. By default the state is empty.
    layers: as in `Transform`, but it returns the notes on each layer in place of the
      savings, because the transform counts these itself. By default the layers are not
      changed.
    outer: as in `Transform`, but it returns notes in place of savings. By default the
      parameters are not changed.
    skip: as in `Transform`. By default it runs `layers` and drops the layers.
    reads_source: whether it reads the source ahead, and so must come first in a chain.
    takes: see `Transform`.
    most_error: the greatest relative error that its notes may state, if it changes the
      function; None if it does not.

  Returns:
    The transform.
  """

  def counted_layers(
    context: Context, state: State, first: int, given: list[Params]
  ) -> tuple[State, list[Params], list[list[Saving]]]:
    if layers is None:
      return state, given, [[Saving(name, 0, 0, [])] for _ in given]
    prefixes = [models.names.prefix(first + i) for i in range(len(given))]
    before = [count(x, context, p) for x, p in zip(given, prefixes, strict=True)]
    state, given, notes = layers(context, state, first, given)
    after = [count(x, context, p) for x, p in zip(given, prefixes, strict=True)]
    sizes = zip(before, after, notes, strict=True)
    return state, given, [[_saving(name, a, b, own)] for a, b, own in sizes]

  def counted_outer(
    context: Context, state: State, given: Params
  ) -> tuple[Params, list[Saving]]:
    if outer is None:
      return given, [Saving(name, 0, 0, [])]
    before = count(given, context)
    given, notes = outer(context, state, given)
    return given, [_saving(name, before, count(given, context), notes)]

  def skipped(context: Context, state: State, first: int, given: list[Params]) -> State:
    if skip is not None:
      return skip(context, state, first, given)
    return state if layers is None else layers(context, state, first, given)[0]

  return Transform(
    (name,),
    init,
    counted_layers,
    counted_outer,
    skipped,
    reads_source=name if reads_source else '',
    takes=takes,
    taker='' if takes == 'any' else name,
    most_error=() if most_error is None else ((name, most_error),),
  )


def chain(*transforms: Transform) -> Transform:
  """Makes one transform that applies several in order.

  >>> chain(make('a'), chain(make('b'), make('c'))).names
  ('a', 'b', 'c')

  Raises:
    ValueError: if a transform that reads the source ahead is not the first, or if two
      transforms take different numbers.
  """
  parts = [transform for transform in transforms if transform.names]
  for i, part in enumerate(parts[1:], 1):
    if part.reads_source:
      raise ValueError(
        f'{part.reads_source!r} must be the first transform of a chain, because it '
        f'reads the source ahead, got it after {parts[i - 1].names[-1]!r}'
      )
  takers: dict[Takes, str] = {x.takes: x.taker for x in parts if x.takes != 'any'}
  if len(takers) > 1:
    raise ValueError(
      f'{takers["stored"]!r} takes numbers as they are stored, and '
      f'{takers["float32"]!r} takes float32 numbers that are rounded at the end: they '
      'cannot be in one chain'
    )
  takes: Takes = 'any'
  for found in takers:
    takes = found

  def init(context: Context) -> State:
    return tuple(part.init(context) for part in parts)

  def layers(
    context: Context, state: State, first: int, given: list[Params]
  ) -> tuple[State, list[Params], list[list[Saving]]]:
    states: list[State] = []
    savings: list[list[Saving]] = [[] for _ in given]
    for part, own in zip(parts, state, strict=True):
      own, given, found = part.layers(context, own, first, given)
      states.append(own)
      for saved, more in zip(savings, found, strict=True):
        saved += more
    return tuple(states), given, savings

  def outer(
    context: Context, state: State, given: Params
  ) -> tuple[Params, list[Saving]]:
    savings: list[Saving] = []
    for part, own in zip(parts, state, strict=True):
      given, found = part.outer(context, own, given)
      savings += found
    return given, savings

  def skip(context: Context, state: State, first: int, given: list[Params]) -> State:
    return tuple(
      part.skip(context, own, first, [dict(x) for x in given])
      for part, own in zip(parts, state, strict=True)
    )

  return Transform(
    tuple(name for part in parts for name in part.names),
    init,
    layers,
    outer,
    skip,
    reads_source=parts[0].reads_source if parts else '',
    takes=takes,
    taker=takers.get(takes, ''),
    most_error=tuple(x for part in parts for x in part.most_error),
  )


def note(path: str, leaf: Any, *, error: Any = 0.0, **details: Any) -> Note:
  """Makes a note on one tensor.

  Args:
    path: path of the parameter in the whole model.
    leaf: the array or structured leaf that now stands for the parameter, unstacked.
    error: relative error of the leaf, in the Frobenius norm.
    details: further JSON values, or arrays of shape `[]`.
  """
  return {
    'tensor': path,
    'form': leaf.type_name if structured.is_structured(leaf) else 'array',
    'shape': list(leaf.shape),
    **details,
    'numbers': structured.count_elements(leaf),
    'error': error,
  }


def count(params: Params, context: Context, prefix: str = '') -> tuple[int, int]:
  """Counts the numbers and bytes of unstacked parameters, rounded but not coded.

  Args:
    params: parameters of a layer, or parameters outside the layers.
    context: it has the dtypes to which the parameters are rounded.
    prefix: the prefix of the parameters' paths in the whole model.

  Returns:
    The number of numbers and the number of bytes.
  """
  numbers, size = 0, 0
  for path, leaf in params.items():
    dtype = context.dtypes.get(prefix + path, context.dtype)
    # A rounded leaf is only described, and not computed.
    rounded = jax.eval_shape(lambda x, dtype=dtype: structured.astype(x, dtype), leaf)
    numbers += structured.count_elements(rounded)
    size += structured.count_bytes(rounded)
  return numbers, size


def _saving(
  name: str, before: tuple[int, int], after: tuple[int, int], notes: list[Note]
) -> Saving:
  return Saving(name, before[0] - after[0], before[1] - after[1], notes)
