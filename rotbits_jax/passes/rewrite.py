"""Rewrites a model with a chain of transforms, layer by layer.

The layers pass through each transform once, in order. `rewrite` reads one layer at a
time from a source, widens the weights to float32, applies the transforms, and rounds
the weights once to the dtypes of the source. The parameters outside the layers come
last, because the embedding may be stored in terms of the head.

A record is a part of the model that is stored and decoded on its own: a layer, the
embedding, the final norm or the head. A saving is the count of elements and bytes that
a transform removed from a record.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import functools
from typing import NamedTuple

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
from rotbits_jax.passes.transform import State
from rotbits_jax.passes.transform import Transform

Rounding = rounding_lib.Rounding | None


class Saving(NamedTuple):
  """The elements and bytes that one transform removed from one record.

  Attributes:
    name: name of the transform.
    elements: how many elements fewer are stored; negative if there are more.
    bytes: how many bytes fewer those elements take before they are coded.
    notes: notes on the tensors of the record.
  """

  name: str
  elements: int
  bytes: int
  notes: tuple[Note, ...] = ()


class Record(NamedTuple):
  """A part of a model that is stored and decoded on its own.

  Attributes:
    name: 'layers.0', 'layers.1', ..., 'embed', 'final_norm' or 'head'.
    params: the parameters as they are stored: nested dicts of NumPy arrays and
      structured leaves. The name of the record is the only key of the outermost dict.
    savings: the saving of each transform. The first record outside the layers has the
      savings of all records outside the layers; the others have none.
  """

  name: str
  params: models.Params
  savings: list[Saving]


def make_context(
  source: transform_lib.ModelSource, *, stored_as: str | None = None
) -> Context:
  """Makes the context for a source.

  Args:
    source: the model.
    stored_as: the dtype to which all floating-point weights are rounded, for a source
      that is not rounded yet; None to keep the dtype of each parameter.
  """
  dtypes: dict[str, np.dtype] = {}
  sizes = collections.Counter[np.dtype]()
  for record in (x for x in source.records if x != models.names.BUFFERS):
    for path, leaf in structured.flatten(source.specs(record)).items():
      dtype = np.dtype(leaf.dtype)
      if jnp.issubdtype(dtype, jnp.floating):
        dtype = dtype if stored_as is None else np.dtype(jnp.dtype(stored_as))
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
  layers: range | None = None,
  state: State | None = None,
  outer: bool = True,
) -> Iterator[tuple[list[Record], State]]:
  """Rewrites a model, layer by layer.

  >>> model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  >>> rewritten = rewrite(make_context(model), rotbits_jax.passes.chain())
  >>> [record.name for records, _ in rewritten for record in records]
  ['layers.0', 'layers.1', 'layers.2', 'embed', 'head']

  Args:
    context: see `make_context`.
    chain: the transforms to apply.
    rounding: how weights are rounded after the transforms, which get float32 weights.
      If None, the transforms get the weights as they are stored, so that they can keep
      every bit.
    layers: the layers to rewrite; all by default. If no state is given, the state
      advances over the layers before them.
    state: the state before the first of these layers, as an earlier call yielded it.
    outer: whether to rewrite the parameters outside the layers, too.

  Yields:
    The record of a layer, or all records outside the layers, and the state after them.

  Raises:
    ValueError: if a transform takes other weights than this rounding gives, or if it
      notes an error that is too large, see `Transform`.
  """
  transform_lib.check_takes(chain, 'stored' if rounding is None else 'float32')
  layers = range(context.config.num_layers) if layers is None else layers
  if state is None:
    state = tuple(transform.init(context) for transform in chain)
    # A state depends on what earlier transforms make of the layers.
    count = max((i for i, x in enumerate(chain) if x.advance is not None), default=-1)
    for index in range(layers.start if count >= 0 else 0):
      params = _read(context, index, rounding)
      states, params, _ = _layer(context, chain[:count], state, index, params)
      last = _advanced(context, chain[count], state[count], index, params)
      state = (*states, last, *state[count + 1 :])
  for index in layers:
    params = _read(context, index, rounding)
    state, params, savings = _layer(context, chain, state, index, params)
    prefix = models.names.prefix(index)
    params = {prefix + path: params.pop(path) for path in [*params]}
    name = models.names.layer(index)
    yield [_record(name, params, context, rounding, savings)], state
  if outer:
    yield _outer(context, chain, rounding, state), state


def _read(context: Context, index: int, rounding: Rounding) -> Params:
  """Reads a layer."""
  name = models.names.layer(index)
  return _wide(context.source.read(name)[name], rounding)


def _wide(tree: models.Params, rounding: Rounding) -> Params:
  """Returns parameters by path: as stored without a rounding, else widened."""
  return structured.flatten(tree) if rounding is None else widened(tree)


def _advanced(
  context: Context, transform: Transform, state: State, index: int, params: Params
) -> State:
  """Returns the state with which a layer is rewritten."""
  if transform.advance is None:
    return state
  return transform.advance(context, state, index, params)


def _layer(
  context: Context, chain: Chain, state: State, index: int, params: Params
) -> tuple[State, Params, list[Saving]]:
  """Applies transforms to a layer; returns the states, the layer and the savings."""
  states: list[State] = []

  def apply(transform: Transform, params: Params) -> transform_lib.Noted:
    before = state[len(states)]
    states.append(_advanced(context, transform, before, index, params))
    return transform.layer(context, states[-1], index, params)

  params, savings = _apply(context, chain, models.names.prefix(index), params, apply)
  return tuple(states), params, savings


def _outer(
  context: Context, chain: Chain, rounding: Rounding, state: State
) -> list[Record]:
  """Rewrites the parameters outside the layers."""
  params: Params = {}
  for name, tree in context.source.outer().items():
    # One by one, because both dtypes of a parameter are in memory meanwhile.
    params |= _wide({name: tree}, rounding)
  states = iter(state)
  apply = lambda transform, params: transform.outer(context, next(states), params)
  params, savings = _apply(context, chain, '', params, apply)
  records = list[Record]()
  for name in dict.fromkeys(path.split('/')[0] for path in params):
    paths = [path for path in params if path.split('/')[0] == name]
    leaves = {path: params.pop(path) for path in paths}
    records.append(_record(name, leaves, context, rounding, savings))
    savings = []
  return records


def _apply(
  context: Context,
  chain: Chain,
  prefix: str,
  params: Params,
  apply: Callable[[Transform, Params], transform_lib.Noted],
) -> tuple[Params, list[Saving]]:
  """Applies transforms in order; returns the parameters and the savings."""
  savings, size = [], _count(context, prefix, params)
  for transform in chain:
    params, notes = apply(transform, params)
    before, size = size, _count(context, prefix, params)
    checked = tuple(_checked(context, transform, note) for note in notes)
    saved = before[0] - size[0], before[1] - size[1]
    savings.append(Saving(transform.name, *saved, checked))
  return params, savings


def run_chain(
  transforms: Iterable[Transform | Chain],
  model: models.Model,
  *,
  rounding: Rounding = rounding_lib.NEAREST,
) -> tuple[models.Model, list[Saving]]:
  """Applies transforms, in order, to a whole model in memory.

  >>> model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  >>> found, savings = run_chain([rotbits_jax.passes.remove_biases()], model)
  >>> savings[0].name, savings[0].elements
  ('biases', 381)

  Args:
    transforms: the transforms.
    model: the model. If its `stored_as` is set, that is the dtype to round to.
    rounding: see `rewrite`.

  Returns:
    The rewritten model, with NumPy arrays, and one saving for each transform.

  Raises:
    ValueError: see `rewrite` and `chain`.
  """
  context = make_context(model, stored_as=model.stored_as)
  chain = transform_lib.chain(*transforms)
  rewritten = rewrite(context, chain, rounding=rounding)
  records = [record for some, _ in rewritten for record in some]
  totals = []
  for i, transform in enumerate(chain):
    savings = [record.savings[i] for record in records if len(record.savings) > i]
    savings = [saving for saving in savings if saving.name == transform.name]
    elements, nbytes = sum(x.elements for x in savings), sum(x.bytes for x in savings)
    notes = tuple(note for saving in savings for note in saving.notes)
    totals.append(Saving(transform.name, elements, nbytes, notes))
  params = {name: x for record in records for name, x in record.params.items()}
  names = [models.names.layer(i) for i in range(model.config.num_layers)]
  layers = [params.pop(name) for name in names]
  return models.from_layers(model.config, params, layers, model.buffers), totals


def count_model(model: models.Model) -> tuple[int, int]:
  """Returns how many elements a model stores, and their bytes before coding.

  >>> model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  >>> count_model(model)  # elements, bytes
  (512421, 1024842)
  """
  context = make_context(model, stored_as=model.stored_as)
  elements, size = _count(context, '', dict(model.leaves()))
  buffers = structured.count_elements(model.buffers)
  return elements + buffers, size + structured.count_bytes(model.buffers)


def widened(tree: models.Params) -> Params:
  """Returns parameters in float32 on the device, by path.

  Arrays take the place of multiples of steps.
  """
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


# ---- records and savings -----------------------------------------------------------


ROUNDING = 'rounding'
"""Name of the saving that rounding to a coarser step makes."""


def _record(
  name: str,
  params: Params,
  context: Context,
  rounding: Rounding,
  savings: list[Saving],
) -> Record:
  """Makes a record of its rewritten parameters, by whole paths, on the host."""
  if rounding is None:
    return Record(name, structured.unflatten(jax.device_get(params)), savings)
  params, notes, bits = rounding_lib.round_params(rounding, params, context)
  rounded = [Saving(ROUNDING, 0, int(bits / 8), tuple(notes))] if notes else []
  return Record(name, structured.unflatten(params), savings + rounded)


def _count(context: Context, prefix: str, params: Params) -> tuple[int, int]:
  """Counts the elements and bytes of parameters, rounded but not coded.

  Args:
    context: it has the dtypes to which the parameters are rounded.
    prefix: the beginning of the paths in the whole model.
    params: unstacked parameters.
  """
  elements = size = 0
  for path, leaf in params.items():
    dtype = context.dtypes.get(prefix + path, context.dtype)
    rounded = leaf
    # The rounded leaf is only described, and not computed.
    if structured.is_plain(leaf):
      rounded = jax.ShapeDtypeStruct(leaf.shape, dtype)
    elif leaf.dtype != dtype:
      convert = functools.partial(structured.astype, dtype=dtype)
      rounded = jax.eval_shape(convert, leaf)
    elements += structured.count_elements(rounded)
    size += structured.count_bytes(rounded)
  return elements, size


def _checked(context: Context, transform: Transform, note: Note) -> Note:
  """Returns a note of JSON values; a ValueError if its error is too large."""
  values = jax.device_get([*note.values()])  # JAX would sort the keys of a dict
  note = dict(zip(note, values, strict=True))
  unit = max(context.roundoff, float(note.get('plain_error', 0)))
  most = transform_lib.MOST_ERROR * unit
  if not note.get('error', 0) <= most:  # also if it is NaN
    raise ValueError(
      f'{transform.name}: {note["tensor"]} has a relative error of '
      f'{float(note["error"]):.3g}, which must be at most {most:.3g}'
    )
  return {key: rounding_lib.to_json(value) for key, value in note.items()}
