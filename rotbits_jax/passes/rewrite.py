"""Rewrites a model with a transform, a few layers at a time.

The layers pass through a transform once, in order. `rewrite` reads one layer at a time
from a source, or one for each device if there are several devices. It widens the
numbers to float32, applies the transform, and rounds the numbers once to the dtypes of
the source. The parameters outside the layers come last, because the embedding may be
stored in terms of the head.

A record is a part of the model that is stored and decoded on its own: a layer, the
embedding, the final norm or the head.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import rounding as rounding_lib
from rotbits_jax.passes import transform as transform_lib
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Params
from rotbits_jax.passes.transform import Saving
from rotbits_jax.passes.transform import Transform


class Record(NamedTuple):
  """A part of a model that is stored and decoded on its own.

  Attributes:
    name: 'layers.0', 'layers.1', ..., 'embed', 'final_norm' or 'head'.
    params: the parameters as they are stored: nested dicts of NumPy arrays and
      structured leaves. Outside the layers the first key is the name of the record.
    savings: the saving of each transform. The first record outside the layers has the
      savings of all records outside the layers; the others have none.
  """

  name: str
  params: models.Params
  savings: list[Saving]


def make_context(
  source: transform_lib.Source,
  *,
  stored_as: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Context:
  """Makes the context for a source.

  Args:
    source: the model.
    stored_as: the dtype to which all floating-point numbers are rounded, for a source
      that is not rounded yet; None to keep the dtype of each parameter.
    mesh: see `Context`.
  """
  dtypes: dict[str, np.dtype] = {}
  sizes = collections.Counter[np.dtype]()
  for index in (None, *range(source.config.num_layers)):
    for path, leaf in structured.flatten(source.specs(index)).items():
      dtype = np.dtype(leaf.dtype)
      if jnp.issubdtype(dtype, jnp.floating):
        dtype = dtype if stored_as is None else np.dtype(jnp.dtype(stored_as))
        sizes[dtype] += int(np.prod(leaf.shape))
      dtypes[models.names.prefix(index) + path] = dtype
  most = sizes.most_common(1)[0][0] if sizes else np.dtype(np.float32)
  return Context(source, dtypes, most, mesh)


def rewrite(
  context: Context,
  transform: Transform,
  *,
  rounding: rounding_lib.Rounding | None = rounding_lib.NEAREST,
  layers: range | None = None,
  state: Any = None,
  outer: bool = True,
) -> Iterator[tuple[list[Record], Any]]:
  """Rewrites a model, a few layers at a time.

  Args:
    context: see `make_context`.
    transform: the transform to apply; `chain` makes one from several.
    rounding: how numbers are rounded after the transform, which gets float32 numbers.
      If None, the transform gets the numbers as they are stored, so that it can keep
      every bit.
    layers: the layers to rewrite; all by default. If no state is given, the layers
      before them are skipped with `transform.skip`.
    state: the state before the first of these layers, as an earlier call yielded it.
    outer: whether to rewrite the parameters outside the layers, too.

  Yields:
    Complete records, and the state after them.

  Raises:
    ValueError: if the transform takes other numbers than this rounding gives, or if the
      transform notes an error that is too large, see `transform.MOST_ERROR`.
  """
  given_takes = 'stored' if rounding is None else 'float32'
  if transform.takes not in ('any', given_takes):
    raise ValueError(
      f'{transform.taker!r} takes {transform.takes} numbers, but the rounding gives '
      f'{given_takes} numbers'
    )
  count = context.config.num_layers
  layers = range(count) if layers is None else layers
  return _rewrite(context, transform, rounding, layers, state, outer)


def _rewrite(
  context: Context,
  transform: Transform,
  rounding: rounding_lib.Rounding | None,
  layers: range,
  state: Any,
  outer: bool,
) -> Iterator[tuple[list[Record], Any]]:
  widen = rounding is not None
  step = 1 if context.mesh is None else context.mesh.size
  if state is None:
    state = transform.init(context)
    for first in range(0, layers.start, step):
      before = range(first, min(first + step, layers.start))
      state = transform.skip(context, state, first, _layers(context, before, widen))
  for first in range(layers.start, layers.stop, step):
    indices = range(first, min(first + step, layers.stop))
    state, given, savings = transform.layers(
      context, state, first, _layers(context, indices, widen)
    )
    records = []
    for i, saved in zip(indices, savings, strict=True):
      params, more = _stored(given.pop(0), context, models.names.prefix(i), rounding)
      saved = _checked(saved, context, transform)
      records.append(Record(models.names.layer(i), params, saved + more))
    yield records, state
  if outer:
    if context.mesh is not None:
      # The state is on the device of the last layer. The parameters outside the layers
      # are on the first device.
      first_device = context.mesh.devices.flat[0]
      put = lambda x: jax.device_put(x, first_device) if isinstance(x, jax.Array) else x
      state = jax.tree.map(put, state)
    params = {}
    for name, tree in context.source.outer().items():
      # One by one, because both dtypes of a parameter are in memory meanwhile.
      params |= _given({name: tree}, widen)
    params, saved = transform.outer(context, state, params)
    names = list(dict.fromkeys(path.split('/')[0] for path in params))
    records, saved = [], _checked(saved, context, transform)
    for name in names:
      paths = [path for path in params if path.split('/')[0] == name]
      own, more = _stored({p: params.pop(p) for p in paths}, context, '', rounding)
      records.append(Record(name, own, more if records else saved + more))
    yield records, state


def run_chain(
  transforms: tuple[Transform, ...],
  model: models.Model,
  *,
  rounding: rounding_lib.Rounding | None = rounding_lib.NEAREST,
) -> tuple[models.Model, list[Saving]]:
  """Applies transforms, in order, to a whole model in memory.

  Args:
    transforms: the transforms.
    model: the model. If its `stored_as` is set, that is the dtype to round to.
    rounding: see `rewrite`.

  Returns:
    The rewritten model, with NumPy arrays, and one saving for each transform; a chain
    among them counts as its transforms.

  Raises:
    ValueError: see `rewrite` and `chain`.
  """
  context = make_context(model, stored_as=model.stored_as)
  whole = transform_lib.chain(*transforms)
  totals = [Saving(name, 0, 0, []) for name in whole.names]
  records: list[Record] = []
  for some, _ in rewrite(context, whole, rounding=rounding):
    for record in some:
      own = [saving for saving in record.savings if saving.name != ROUNDING]
      totals = add_savings(totals, own)
      records.append(record)
  return to_model(model.config, records, model.buffers), totals


def to_model(
  config: models.ModelConfig,
  records: Iterable[Record],
  buffers: dict[str, Any] | None = None,
) -> models.Model:
  """Makes a model from all records that `rewrite` yields."""
  layers: list[models.Params] = []
  outer: models.Params = {}
  for record in records:
    if models.names.layer_index(record.name) is not None:
      layers.append(record.params)
    else:
      outer |= record.params
  return models.from_layers(config, outer, layers, buffers)


def add_savings(totals: list[Saving], more: list[Saving]) -> list[Saving]:
  """Adds the savings of a record to the totals, transform by transform.

  Args:
    totals: one saving for each transform, in order.
    more: the savings of one record in the same order, or an empty list.

  Returns:
    The new totals, with the names of `totals`.
  """
  if not more:
    return totals
  return [
    Saving(a.name, a.numbers + b.numbers, a.bytes + b.bytes, a.notes + b.notes)
    for a, b in zip(totals, more, strict=True)
  ]


def leaves(model: models.Model) -> Iterator[tuple[str, Any]]:
  """Yields each leaf, unstacked, with a path like 'layers.0/attention/query/kernel'."""
  yield from structured.flatten(model.outer()).items()
  for i, layer in enumerate(model.layers()):
    for path, leaf in structured.flatten(layer).items():
      yield models.names.prefix(i) + path, leaf


def count_model(model: models.Model) -> tuple[int, int]:
  """Returns how many numbers a model stores, and their bytes before coding."""
  context = make_context(model, stored_as=model.stored_as)
  numbers, size = transform_lib.count(dict(leaves(model)), context)
  buffers = structured.count_elements(model.buffers)
  return numbers + buffers, size + structured.count_bytes(model.buffers)


# ---- between the source and the transforms -----------------------------------------


def _layers(context: Context, indices: range, widen: bool) -> list[Params]:
  devices = [None] if context.mesh is None else list(context.mesh.devices.flat)
  return [
    _given(context.source.layer(i), widen, devices[k % len(devices)])
    for k, i in enumerate(indices)
  ]


def _given(tree: models.Params, widen: bool, device: Any = None) -> Params:
  """Returns the parameters for a transform: float32 on a device, or as stored."""
  params = structured.flatten(tree)
  if not widen:
    return structured.for_writing(params)
  return _widened(jax.device_put(params, device))


@jax.jit
def _widened(params: Params) -> Params:
  return structured.astype(structured.for_writing(params), jnp.float32)


def _checked(
  savings: list[Saving], context: Context, transform: Transform
) -> list[Saving]:
  """Returns savings with notes of JSON values.

  Raises:
    ValueError: if a note states an error that is too large.
  """
  most_errors = dict(transform.most_error)
  # JAX sorts the keys of a dict.
  values = iter(jax.device_get([tuple(n.values()) for x in savings for n in x.notes]))
  found = []
  for saving in savings:
    notes = []
    for keys in saving.notes:
      note = dict(zip(keys, next(values), strict=True))
      unit = max(context.roundoff, float(note.get('plain_error', 0)))
      most = most_errors.get(saving.name, transform_lib.MOST_ERROR * unit)
      if not note.get('error', 0) <= most:
        raise ValueError(
          f'{saving.name}: {note["tensor"]} has a relative error of '
          f'{float(note["error"]):.3g}, which must be at most {most:.3g}'
        )
      notes.append({key: _json(value) for key, value in note.items()})
    found.append(saving._replace(notes=notes))
  return found


def _json(value: Any) -> Any:
  """Returns a number of a note as a JSON value, with three digits."""
  if isinstance(value, np.generic | np.ndarray):
    value = value.item()
  return rounding_lib.three_digits(value) if isinstance(value, float) else value


ROUNDING = 'rounding'
"""Name of the saving that rounding to a coarser step makes."""


def _stored(
  params: Params, context: Context, prefix: str, rounding: rounding_lib.Rounding | None
) -> tuple[models.Params, list[Saving]]:
  """Returns the parameters of a record on the host, and the saving of rounding."""
  if rounding is None:
    return structured.unflatten(jax.device_get(params)), []
  params, notes, bits = rounding_lib.apply(rounding, params, context, prefix)
  saved = [Saving(ROUNDING, 0, int(bits / 8), notes)] if notes else []
  return structured.unflatten(params), saved
