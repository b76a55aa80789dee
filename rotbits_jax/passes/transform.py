"""Transforms, chains of transforms, and the walk of a model through a chain.

A transform replaces arrays by structured leaves. It keeps the function of the model, or
it notes how it changes it. Transforms are written like Optax's, as pure functions.

One layer at a time is read from a source, widened to float32, rewritten by all
transforms, and rounded once to the dtypes of the source. The parameters outside the
layers come last, because the embedding may be stored in terms of the head.

Parameters are dicts of leaves by path, as in `structured.flatten`. **A transform owns
the parameters that it gets**, as a function owns donated buffers: it may change the
dict and return it. So the memory of a leaf is free as soon as it is rewritten.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple, Protocol
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import rounding as rounding_lib
from rotbits_jax.system import schema

_MOST_ERROR = 8.0  # that a note may state, in roundoffs or plain errors
_SMALL_ROW = 8.0  # how many times smaller than others a row is that shares their step

Params = dict[str, Any]  # leaves by path
State = Any  # a PyTree of arrays
Note = dict[str, Any]
"""Facts on one tensor for the report: JSON values, or numbers as arrays `[]`.

The `error` is the relative error of the leaf in the Frobenius norm, a `plain_error`
that of plain arrays. An `obstacle` says why the transform did nothing.
"""
Noted = tuple[Params, dict[str, Note]]  # the notes by path


class Source(Protocol):
  """Arrays in records: a `models.Model`, a checkpoint on disk, or any arrays."""

  @property
  def config(self) -> Any: ...  # of the model; None for arrays of none

  @property
  def stored_as(self) -> str | None: ...  # None if the arrays are rounded already

  @property
  def records(self) -> tuple[str, ...]: ...  # names, in the order of the file

  def specs(self, record: str) -> models.Params:
    """Returns the shapes and dtypes of a record; nothing is read from disk."""

  def read(self, record: str) -> models.Params:
    """Returns the leaves of a record: nested dicts with whole paths."""


class Context(NamedTuple):
  """Information that every function of a transform gets, see `make_context`."""

  source: Source  # the model before any transform
  dtypes: Mapping[str, np.dtype]  # to which parameters are rounded at the end, by path
  dtype: np.dtype  # to which most weights are rounded
  prefix: str = ''  # of the paths of the layer that is rewritten

  @property
  def config(self) -> models.ModelConfig:
    config: models.ModelConfig = self.source.config
    return config

  @property
  def roundoff(self) -> float:
    """Unit roundoff of `dtype`, but at least 2^-19, the error of float32 algebra."""
    least = 16 * float(jnp.finfo(jnp.float32).eps)
    return max(float(jnp.finfo(self.dtype).eps) / 2, least)

  def dtype_of(self, path: str) -> np.dtype:
    """Returns the dtype to which a parameter is rounded at the end."""
    return self.dtypes.get(self.prefix + path, self.dtype)

  def read(self, index: int | None, convert: Any = structured.flatten) -> Params:
    """Returns a layer of the source; for None, all that is outside the layers."""
    names = [x for x in self.source.records if x in models.outer_shapes(self.config)]
    params: Params = {}
    for name in names if index is None else [models.names.layer(index)]:
      # One by one, because both dtypes are in memory meanwhile.
      tree = self.source.read(name)
      params |= convert(tree if index is None else tree[name])
    return params


def make_context(source: Source) -> Context:
  """Makes the context of the transforms of a source."""
  dtypes: dict[str, np.dtype] = {}
  sizes = collections.Counter[np.dtype]()
  for record in (x for x in source.records if x != models.names.BUFFERS):
    for path, leaf in structured.flatten(source.specs(record)).items():
      dtype = np.dtype(leaf.dtype)
      if jnp.issubdtype(dtype, jnp.floating):
        dtype = np.dtype(jnp.dtype(source.stored_as or dtype))
        sizes[dtype] += math.prod(leaf.shape)
      dtypes[path] = dtype
  most = sizes.most_common(1)[0][0] if sizes else np.dtype(np.float32)
  return Context(source, dtypes, most)


def _unchanged(context: Context, state: State, *args: Any) -> Noted:
  """Returns parameters, the last argument, as they are."""
  return args[-1], {}


class Transform(NamedTuple):
  """A pass over a model, as functions that return parameters and notes.

  Only the first transform of a chain may have a state, and read parts of the source
  ahead. All transforms of the chain get this state.

  >>> [transform.name for transform in chain(Transform('a'), chain(Transform('b')))]
  ['a', 'b']
  """

  name: str  # of its saving in the report
  # Returns the layer with this index, rewritten, and its notes.
  layer: Callable[[Context, State, int, Params], Noted] = _unchanged
  # Returns the parameters outside the layers, rewritten; gets the last state.
  outer: Callable[[Context, State, Params], Noted] = _unchanged
  # Returns the state for the layer with this index, given the one before, which is None
  # for layer 0, and the layer.
  advance: Callable[[Context, State, int, Params], State] | None = None


Chain = tuple[Transform, ...]


def chain(*transforms: Transform | Chain) -> Chain:
  """Makes a chain of transforms and chains; a ValueError if they do not fit."""
  flat: Chain = ()
  for item in transforms:
    flat += (item,) if isinstance(item, Transform) else item
  for index, transform in enumerate(flat):
    if index and transform.advance is not None:
      raise ValueError(f'{transform.name!r} has a state: it must be the first one')
  return flat


# ---- the walk of a model -----------------------------------------------------------


class Saving(NamedTuple):
  """The elements and bytes, not coded, that one transform removed from one record."""

  name: str  # of the transform; 'rounding' if a coarser step saves the bytes
  elements: schema.Integer  # how many fewer are stored; negative if there are more
  bytes: schema.Integer
  # On the tensors of the record.
  notes: tuple[dict[str, schema.Scalar | tuple[schema.Scalar, ...]], ...] = ()


class Record(NamedTuple):
  """A part of a model that is stored and decoded on its own."""

  name: str  # 'layers.0', 'layers.1', ..., 'embed', 'final_norm' or 'head'
  params: models.Params  # nested dicts whose only outermost key is the name
  savings: list[Saving]  # of each transform; all outer ones are in one record
  unchanged: frozenset[str] = frozenset()  # paths that were only rounded


def rewrite(
  context: Context,
  chain: Chain,
  *,
  rounding: rounding_lib.Rounding | None = rounding_lib.NEAREST,
  layers: range | None = None,  # those to rewrite; all by default
  state: State | None = None,  # before these layers, as an earlier call yielded it
  outer: bool = True,  # whether to rewrite the parameters outside the layers, too
) -> Iterator[tuple[list[Record], State]]:
  """Rewrites a model, layer by layer.

  With a rounding, the transforms get float32 weights, which are rounded after them;
  without one, they get the weights as they are stored.

  >>> model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  >>> rewritten = rewrite(make_context(model), rotbits_jax.passes.chain())
  >>> [record.name for records, _ in rewritten for record in records]
  ['layers.0', 'layers.1', 'layers.2', 'embed', 'head']

  Yields the record of a layer, or all records outside the layers, and the state after
  them. A ValueError says that a transform notes an error above 8 roundoffs, or that it
  changes a dtype and there is no rounding.
  """
  layers = range(context.config.num_layers) if layers is None else layers
  advance = chain[0].advance if chain else None
  before = layers.start if advance is not None and state is None else 0
  for index in (*range(before), *layers, *[None] * outer):
    params = context.read(index, structured.flatten if rounding is None else widened)
    if advance is not None and index is not None:
      state = advance(context, state, index, params)
    if index is None or index in layers:
      # No leaf is held that a transform replaces.
      read = {path: weakref.ref(leaf) for path, leaf in params.items()}
      params, savings = _apply(context, chain, state, index, params)
      unchanged = [x for x in params.keys() & read if params[x] is read[x]()]
      yield _records(context, rounding, index, params, savings, unchanged), state


def _apply(
  context: Context, chain: Chain, state: State, index: int | None, params: Params
) -> tuple[Params, list[Saving]]:
  """Applies transforms to a layer, or to the parameters outside the layers."""
  context = context._replace(prefix=models.names.prefix(index))
  savings, size = list[Saving](), _count(context, params)
  for transform in chain:
    if index is None:
      params, notes = transform.outer(context, state, params)
    else:
      params, notes = transform.layer(context, state, index, params)
    before, size = size, _count(context, params)
    saved = before[0] - size[0], before[1] - size[1]
    describe = functools.partial(_described, context, transform.name)
    described = (describe(path, params[path], note) for path, note in notes.items())
    savings.append(Saving(transform.name, *saved, tuple(described)))
  return params, savings


def _records(
  context: Context,
  rounding: rounding_lib.Rounding | None,
  index: int | None,
  params: Params,
  savings: list[Saving],
  unchanged: Sequence[str],
) -> list[Record]:
  """Rounds rewritten parameters, and makes records of them on the host."""
  prefix, records = models.names.prefix(index), list[Record]()
  paths = frozenset(prefix + path for path in unchanged)
  params = {prefix + path: params.pop(path) for path in [*params]}
  for name in dict.fromkeys(path.split('/')[0] for path in params):
    leaves = {x: params.pop(x) for x in [*params] if x.split('/')[0] == name}
    if rounding is None:
      leaves = jax.device_get(leaves)
      if changed := [x for x, y in leaves.items() if y.dtype != context.dtype_of(x)]:
        path, dtype = changed[0], context.dtype_of(changed[0])
        text = f'transforms must keep the dtype {dtype}, got {leaves[path].dtype}'
        raise ValueError(f'{path}: without a rounding, {text}')
    else:
      leaves, notes, bits = round_params(rounding, leaves, context)
      notes = [{key: _to_json(x) for key, x in note.items()} for note in notes]
      if notes:
        savings = [*savings, Saving('rounding', 0, int(bits / 8), tuple(notes))]
    tree = structured.unflatten(leaves)
    records.append(Record(name, tree, savings, paths.intersection(leaves)))
    savings = []
  return records


def round_params(
  rounding: rounding_lib.Rounding, params: Params, context: Context
) -> tuple[Params, list[Note], float]:
  """Rounds the float32 parameters of a record, and fetches them from their device.

  It also returns a note for each matrix that was rounded to a step, and about how many
  bits that saves an entropy coder.
  """
  effects: dict[str, rounding_lib.Effect] = {}
  for path in list(params):
    leaf, dtype = params[path], context.dtype_of(path)
    log2_step = rounding.log2_step(path, dtype)
    is_matrix = structured.is_plain(leaf) and rounding_lib.is_matrix(leaf)
    is_tied = isinstance(leaf, structured.Tied)  # fitted to the head, and small
    is_leaf, inputs = structured.is_structured(leaf), rounding.inputs.get(path)
    if log2_step is None or is_tied or not (is_matrix or is_leaf):
      continue
    if inputs is not None and path == 'head/kernel':
      # Steps of its columns save more than the zeros of a structured leaf.
      leaf = structured.materialize(leaf)
    if is_matrix and path == 'embed/tokens' and not rounding.uniform:
      log2_step += _finer_for_small_rows(leaf, context.config)
    params[path], effects[path] = rounding_lib.round_leaf(
      leaf, dtype, log2_step, rounding.uniform, inputs
    )
  params, effects = jax.device_get((params, effects))
  for path in effects:
    params[path] = rounding_lib.narrowed(params[path])
  for path in params.keys() - effects.keys():
    # On the host, because these are vectors as a rule, and a program for so few weights
    # takes longer to compile.
    dtype = rounding.dtype or context.dtype_of(path)
    params[path] = structured.astype(params[path], dtype)
  notes = [
    {'tensor': path, 'step': x.step, 'error': np.sqrt(x.squares / max(x.norm, 1e-30))}
    for path, x in effects.items()
    if x.step
  ]
  return params, notes, sum(float(effect.bits) for effect in effects.values())


def _finer_for_small_rows(table: jax.Array, config: models.ModelConfig) -> float:
  """Returns log2 of the factor by which the step of an embedding must be smaller."""
  # The first norm makes the row of a token as large as any other, unless its epsilon
  # is larger than the row, or positions are added to it.
  squares = np.asarray(jnp.square(table).sum(axis=1))
  least = config.norm_eps * config.hidden_size
  counted = squares[(squares > least) & np.isfinite(squares)]
  if config.learned_positions or not counted.size:
    return 0.0
  ratio = float(counted.min()) / float(counted.mean(dtype=np.float64))
  return min(math.log2(_SMALL_ROW) + math.log2(ratio) / 2, 0.0)


def run_chain(
  transforms: Iterable[Transform | Chain],
  model: models.Model,
  *,
  rounding: rounding_lib.Rounding | None = rounding_lib.NEAREST,
) -> tuple[models.Model, list[Saving]]:
  """Applies transforms to a model in memory; one saving sums up each transform.

  >>> model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  >>> rewritten, savings = run_chain([rotbits_jax.passes.retie_embedding()], model)
  >>> savings[0].name, savings[0].elements
  ('tied embedding', 0)
  """
  flat = chain(*transforms)
  rewritten = rewrite(make_context(model), flat, rounding=rounding)
  records = [record for batch, _ in rewritten for record in batch]
  savings = []
  for name in dict.fromkeys(transform.name for transform in flat):
    of_records = [x for record in records for x in record.savings if x.name == name]
    _, elements, sizes, notes = zip(*of_records, strict=True)
    savings.append(Saving(name, sum(elements), sum(sizes), sum(notes, ())))
  params = {name: x for record in records for name, x in record.params.items()}
  layers = [params.pop(models.names.layer(i)) for i in range(model.config.num_layers)]
  return models.from_layers(model.config, params, layers, model.buffers), savings


def widened(tree: models.Params) -> Params:
  """Returns parameters in float32 on one device, by path; arrays for integers."""
  # An array of several devices is gathered: programs take whole arrays.
  return _widened(jax.device_put(structured.flatten(tree), jax.local_devices()[0]))


@jax.jit
def _widened(params: Params) -> Params:
  """Returns arrays and leaves in float32."""
  is_uniform = lambda x: isinstance(x, structured.UniformlyQuantized)
  arrays = {k: x.materialize() if is_uniform(x) else x for k, x in params.items()}
  return structured.astype(arrays, jnp.float32)


# ---- savings and notes -------------------------------------------------------------


def _count(context: Context, params: Params) -> tuple[int, int]:
  """Counts the elements and bytes of parameters, rounded but not coded."""
  elements = nbytes = 0
  for path, leaf in params.items():
    rounded = context.dtype_of(path)
    for dtype, size in structured.stored_sizes(leaf):
      is_rounded = leaf.dtype != rounded and jnp.issubdtype(dtype, jnp.floating)
      elements += size
      nbytes += size * (rounded if is_rounded else dtype).itemsize
  return elements, nbytes


def _described(context: Context, name: str, path: str, leaf: Any, note: Note) -> Note:
  """Completes the note on a leaf; a ValueError if its error is too large."""
  values = jax.device_get([*note.values()])  # JAX would sort the keys of a dict
  note = {'error': 0.0} | dict(zip(note, values, strict=True))
  most = _MOST_ERROR * max(context.roundoff, float(note.get('plain_error', 0)))
  if not note['error'] <= most:  # also if it is NaN
    text = f'error of {float(note["error"]):.3g}, which must be at most {most:.3g}'
    raise ValueError(f'{name}: {context.prefix}{path} has a relative {text}')
  return {
    'tensor': context.prefix + path,
    'form': leaf.type_name if structured.is_structured(leaf) else 'array',
    'shape': list(leaf.shape),
    'elements': structured.count_elements(leaf),
    **{key: _to_json(value) for key, value in note.items()},
  }


def _to_json(value: Any) -> Any:
  """Returns a number with three digits, and None if it is not finite."""
  value = value.item() if isinstance(value, np.generic | np.ndarray) else value
  if not isinstance(value, float):
    return value
  return float(f'{value:.3g}') if math.isfinite(value) else None
