"""Rewrites a model with a chain of transforms, layer by layer.

One layer at a time is read from a source, widened to float32, rewritten by all
transforms, and rounded once to the dtypes of the source. The parameters outside the
layers come last, because the embedding may be stored in terms of the head.

A record is a part of the model that is stored and decoded on its own: a layer, the
embedding, the final norm or the head.
"""

import collections
from collections.abc import Iterable, Iterator
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import rounding as rounding_lib
from rotbits_jax.passes import transform as transform_lib
from rotbits_jax.passes.transform import Chain
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Note
from rotbits_jax.passes.transform import Params
from rotbits_jax.passes.transform import Source
from rotbits_jax.passes.transform import State
from rotbits_jax.passes.transform import Transform

Rounding = rounding_lib.Rounding | None

# The greatest relative error that a note may state, as a multiple of the roundoff, or
# of the `plain_error` of the note.
_MOST_ERROR = 8.0

_ROUNDING = 'rounding'  # name of the saving that a coarser step makes


class Saving(NamedTuple):
  """The elements and bytes, not coded, that one transform removed from one record."""

  name: str  # of the transform
  elements: int  # how many fewer are stored; negative if there are more
  bytes: int
  notes: tuple[Note, ...] = ()  # on the tensors of the record


class Record(NamedTuple):
  """A part of a model that is stored and decoded on its own."""

  name: str  # 'layers.0', 'layers.1', ..., 'embed', 'final_norm' or 'head'
  params: models.Params  # nested dicts whose only outermost key is the name
  savings: list[Saving]  # of each transform; all outer ones are in one record


def make_context(source: Source) -> Context:
  """Makes the context of the transforms of a source."""
  dtypes: dict[str, np.dtype] = {}
  sizes = collections.Counter[np.dtype]()
  for record in (x for x in source.records if x != models.names.BUFFERS):
    for path, leaf in structured.flatten(source.specs(record)).items():
      dtype = np.dtype(leaf.dtype)
      if jnp.issubdtype(dtype, jnp.floating):
        dtype = np.dtype(jnp.dtype(source.stored_as or dtype))
        sizes[dtype] += int(np.prod(leaf.shape))
      dtypes[path] = dtype
  most = sizes.most_common(1)[0][0] if sizes else np.dtype(np.float32)
  return Context(source, dtypes, most)


# ---- a whole model -----------------------------------------------------------------


def rewrite(
  context: Context,
  chain: Chain,
  *,
  rounding: Rounding = rounding_lib.NEAREST,
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
  them. A ValueError says that a transform takes other weights than this rounding gives,
  or notes an error above 8 roundoffs.
  """
  transform_lib.check_takes(chain, 'stored' if rounding is None else 'float32')
  layers = range(context.config.num_layers) if layers is None else layers
  if state is None:
    state = tuple(transform.init(context) for transform in chain)
    for index in range(layers.start):
      state = _skipped(context, chain, rounding, state, index)
  for index in layers:
    params = _read(context, rounding, index)
    state, params, savings = _apply(context, chain, state, index, params)
    yield _records(context, rounding, index, params, savings), state
  if outer:
    params = _read(context, rounding, None)
    _, params, savings = _apply(context, chain, state, None, params)
    yield _records(context, rounding, None, params, savings), state


def _read(context: Context, rounding: Rounding, index: int | None) -> Params:
  """Reads a layer; the parameters outside the layers for None."""
  params: Params = {}
  for tree in context.read(index):  # one by one: both dtypes are in memory meanwhile
    params |= structured.flatten(tree) if rounding is None else widened(tree)
  return params


def _apply(
  context: Context, chain: Chain, state: State, index: int | None, params: Params
) -> tuple[State, Params, list[Saving]]:
  """Applies transforms to a layer, or to the parameters outside the layers."""
  prefix, states, savings = models.names.prefix(index), [], []
  size = _count(context, prefix, params)
  for transform, reached in zip(chain, state, strict=True):
    if index is None:
      params, notes = transform.outer(context, reached, params)
    else:
      if transform.advance is not None:
        reached = transform.advance(context, reached, index, params)
      params, notes = transform.layer(context, reached, index, params)
    states.append(reached)
    before, size = size, _count(context, prefix, params)
    checked = tuple(_checked(context, transform, note) for note in notes)
    saved = before[0] - size[0], before[1] - size[1]
    savings.append(Saving(transform.name, *saved, checked))
  return tuple(states), params, savings


def _skipped(
  context: Context, chain: Chain, rounding: Rounding, state: State, index: int
) -> State:
  """Returns the state after a layer that is not rewritten."""
  last = max((i for i, x in enumerate(chain) if x.advance is not None), default=-1)
  advance = chain[last].advance if chain else None
  if advance is None:
    return state
  # A state depends on what earlier transforms make of the layer.
  params = _read(context, rounding, index)
  states, params, _ = _apply(context, chain[:last], state[:last], index, params)
  return *states, advance(context, state[last], index, params), *state[last + 1 :]


def _records(
  context: Context,
  rounding: Rounding,
  index: int | None,
  params: Params,
  savings: list[Saving],
) -> list[Record]:
  """Rounds rewritten parameters, and makes records of them on the host."""
  prefix, records = models.names.prefix(index), list[Record]()
  params = {prefix + path: params.pop(path) for path in [*params]}
  for name in dict.fromkeys(path.split('/')[0] for path in params):
    paths = [path for path in params if path.split('/')[0] == name]
    leaves = {path: params.pop(path) for path in paths}
    if rounding is None:
      leaves = jax.device_get(leaves)
    else:
      leaves, notes, bits = rounding_lib.round_params(rounding, leaves, context)
      if notes:
        savings = [*savings, Saving(_ROUNDING, 0, int(bits / 8), tuple(notes))]
    records.append(Record(name, structured.unflatten(leaves), savings))
    savings = []
  return records


def run_chain(
  transforms: Iterable[Transform | Chain],
  model: models.Model,
  *,
  rounding: Rounding = rounding_lib.NEAREST,
) -> tuple[models.Model, list[Saving]]:
  """Applies transforms to a model in memory; one saving sums up each transform.

  >>> model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  >>> rewritten, savings = run_chain([rotbits_jax.passes.remove_biases()], model)
  >>> savings[0].name, savings[0].elements
  ('biases', 381)
  """
  context = make_context(model)
  chain = transform_lib.chain(*transforms)
  rewritten = rewrite(context, chain, rounding=rounding)
  records = [record for batch, _ in rewritten for record in batch]
  savings = {transform.name: Saving(transform.name, 0, 0) for transform in chain}
  for saving in (saving for record in records for saving in record.savings):
    if total := savings.get(saving.name):
      savings[saving.name] = Saving(
        saving.name,
        total.elements + saving.elements,
        total.bytes + saving.bytes,
        total.notes + saving.notes,
      )
  params = {name: x for record in records for name, x in record.params.items()}
  names = [models.names.layer(i) for i in range(model.config.num_layers)]
  layers = [params.pop(name) for name in names]
  rewritten_model = models.from_layers(model.config, params, layers, model.buffers)
  return rewritten_model, [*savings.values()]


def count_model(model: models.Model) -> tuple[int, int]:
  """Returns how many elements a model stores, and their bytes before coding.

  >>> model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  >>> count_model(model)  # elements, bytes
  (512421, 1024842)
  """
  context = make_context(model)
  elements, size = _count(context, '', dict(model.leaves()))
  buffers = structured.count_elements(model.buffers)
  return elements + buffers, size + structured.count_bytes(model.buffers)


def widened(tree: models.Params) -> Params:
  """Returns parameters in float32 on the device, by path; arrays for integers."""
  params = structured.flatten(tree)
  # Programs take whole arrays, which are on one device.
  is_sharded = lambda x: isinstance(x, jax.Array) and len(x.devices()) > 1
  params = jax.tree.map(lambda x: jax.device_get(x) if is_sharded(x) else x, params)
  return _widened(jax.device_put(params))


@jax.jit
def _widened(params: Params) -> Params:
  """Returns arrays and leaves in float32."""
  plain = {
    path: x.materialize() if isinstance(x, structured.UniformlyQuantized) else x
    for path, x in params.items()
  }
  return structured.astype(plain, jnp.float32)


# ---- savings and notes -------------------------------------------------------------


def _count(context: Context, prefix: str, params: Params) -> tuple[int, int]:
  """Counts the elements and bytes of parameters, rounded but not coded."""
  elements = size = 0
  for path, leaf in params.items():
    arrays, treedef = jax.tree.flatten(leaf)
    specs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    counts = _count_leaf(treedef, specs, context.dtype_of(prefix + path))
    elements, size = elements + counts[0], size + counts[1]
  return elements, size


@functools.lru_cache(maxsize=1024)  # layers are alike, and describing a leaf is slow
def _count_leaf(
  treedef: Any, specs: tuple[jax.ShapeDtypeStruct, ...], dtype: np.dtype
) -> tuple[int, int]:
  """Counts the elements and bytes of a leaf, which is rounded in description only."""
  leaf = jax.tree.unflatten(treedef, specs)
  if leaf.dtype != dtype:
    leaf = jax.eval_shape(lambda x: structured.astype(x, dtype), leaf)
  return structured.count_elements(leaf), structured.count_bytes(leaf)


def _checked(context: Context, transform: Transform, note: Note) -> Note:
  """Returns a note of JSON values; a ValueError if its error is too large."""
  values = jax.device_get([*note.values()])  # JAX would sort the keys of a dict
  note = dict(zip(note, values, strict=True))
  most = _MOST_ERROR * max(context.roundoff, float(note.get('plain_error', 0)))
  if not note.get('error', 0) <= most:  # also if it is NaN
    raise ValueError(
      f'{transform.name}: {note["tensor"]} has a relative error of '
      f'{float(note["error"]):.3g}, which must be at most {most:.3g}'
    )
  return {key: rounding_lib.to_json(value) for key, value in note.items()}
