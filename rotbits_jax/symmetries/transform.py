"""Transforms: they rewrite a model, a few layers at a time, to store fewer numbers.

A transform replaces arrays by structured leaves, which store fewer numbers than the
arrays that they stand for; see `structured`. It keeps the function of the model, or it
states how it changes the function. Transforms are written like Optax's: a transform is
a few pure functions and a state. The state carries information from layer to layer, for
example the coordinates that were chosen for the residual stream. `chain` makes one
transform from several.

The layers pass through a transform once, in order. `rewrite` reads one layer at a time
from a source, or one for each device if there are several devices. It widens the
numbers to float32, applies the transform, and rounds the numbers once to the dtypes of
the source. The parameters outside the layers come last, because the embedding may be
stored in terms of the head.

A unit is a part of the model that is stored and decoded on its own: a layer, the
embedding, the final norm or the head. A saving is the count of numbers and bytes that a
transform removed from a unit. A note is a JSON object that says what a transform did to
one tensor. Parameters are named by paths, as in `structured.flatten`; in the whole
model, the path of a parameter of a layer begins with 'layers.<index>/'.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries.rounding import NEAREST
from rotbits_jax.symmetries.rounding import Rounding
from rotbits_jax.symmetries.rounding import is_matrix
from rotbits_jax.symmetries.rounding import round_leaf

Note = dict[str, Any]  # JSON values
State = Any  # a PyTree of arrays
Layers = list[models.Params]
Noted = tuple[State, Layers, list[list[Note]]]


class Source(Protocol):
  """A model to read from: a `models.Model`, or a checkpoint that stays on disk."""

  @property
  def config(self) -> models.ModelConfig: ...

  @property
  def records(self) -> tuple[str, ...]:
    """Names of the records, see `models.names`."""

  def outer(self) -> models.Params:
    """The parameters outside the layers."""

  def read(self, record: str) -> models.Params:
    """The parameters of a record, by whole paths."""

  def layer(self, index: int) -> models.Params:
    """The parameters of one layer, unstacked."""

  def specs(self, record: str) -> models.Params:
    """The shapes and dtypes of a record, with the record as the only key."""


class Context(NamedTuple):
  """Information that every function of a transform gets.

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
    """Record roundoff of `dtype`, the dtype of most numbers.

    For float32 it is 2^-19, the error of the float32 linear algebra, because float32's
    own roundoff is never reached.
    """
    least = 16 * float(jnp.finfo(jnp.float32).eps)
    return max(float(jnp.finfo(self.dtype).eps) / 2, least)

  def limit(self, path: str) -> float:
    """Returns the greatest finite number of the dtype of a parameter."""
    return float(jnp.finfo(self.dtypes[path]).max)

  def map_layers(
    self, core: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], **static: Any
  ) -> list[Any]:
    """Applies a pure function of one layer to several layers.

    If there is one layer for each device of the mesh, `shard_map` runs the layers side
    by side. The program for one layer is the same in both cases, so its results are the
    same.

    Args:
      core: the function. It takes arrays, or PyTrees of arrays, and `static`.
      arguments: the positional arguments of `core` for each layer.
      static: hashable settings, the keyword arguments of `core`.

    Returns:
      The result for each layer, on the layer's device.
    """
    settings = tuple(sorted(static.items(), key=lambda item: item[0]))
    if self.mesh is not None and len(arguments) == self.mesh.size > 1:
      kinds = {str(jax.tree.map(_kind, x)) for x in arguments}
      if len(kinds) == 1:
        return _map_over_mesh(core, arguments, settings, self.mesh)
    return [_jitted(core, settings)(*own) for own in arguments]


class Saving(NamedTuple):
  """The numbers and bytes that one transform removed from one unit.

  Attributes:
    name: name of the transform.
    numbers: how many numbers fewer are stored; negative if there are more.
    bytes: how many bytes fewer those numbers take before they are coded.
    notes: notes on the tensors of the unit.
  """

  name: str
  numbers: int
  bytes: int
  notes: list[Note]


class Transform(NamedTuple):
  """One step of a chain. `make` builds one from functions that return notes.

  Attributes:
    names: the names of its savings in the report, in order; a chain has several.
    init: takes the context and returns the state before the first layer. It may read
      any part of the source.
    layers: takes the context, the state, the index of the first layer and consecutive
      layers. It returns the next state, the rewritten layers, and the savings of each
      layer. Numbers are float32, unless `rewrite` got no rounding. It may empty the
      list that it got, to free memory.
    outer: takes the context, the state after the last layer and the parameters outside
      the layers. It returns the rewritten parameters and their savings. It may empty
      the dict that it got.
    skip: takes the arguments of `layers` and returns the next state only.
  """

  names: tuple[str, ...]
  init: Callable[[Context], State]
  layers: Callable[
    [Context, State, int, Layers], tuple[State, Layers, list[list[Saving]]]
  ]
  outer: Callable[[Context, State, models.Params], tuple[models.Params, list[Saving]]]
  skip: Callable[[Context, State, int, Layers], State]


def make(
  name: str,
  *,
  init: Callable[[Context], State] = lambda context: (),
  layers: Callable[[Context, State, int, Layers], Noted] | None = None,
  outer: Callable[[Context, State, models.Params], tuple[models.Params, list[Note]]]
  | None = None,
  skip: Callable[[Context, State, int, Layers], State] | None = None,
) -> Transform:
  """Makes a transform from functions that return notes, see `Transform` and `note`.

  Args:
    name: name of the saving in the report.
    init: as in `Transform`. By default the state is empty.
    layers: as in `Transform`, but it returns the notes on each layer in place of the
      savings, because the transform counts these itself. By default the layers are not
      changed.
    outer: as in `Transform`, but it returns notes in place of savings. By default the
      parameters are not changed.
    skip: as in `Transform`. By default it runs `layers` and drops the layers.

  Returns:
    The transform.
  """

  def counted_layers(
    context: Context, state: State, first: int, given: Layers
  ) -> tuple[State, Layers, list[list[Saving]]]:
    if layers is None:
      return state, given, [[Saving(name, 0, 0, [])] for _ in given]
    before = [
      count(x, context, models.names.prefix(first + i)) for i, x in enumerate(given)
    ]
    state, rewritten, notes = layers(context, state, first, given)
    savings = []
    for i, (layer, own) in enumerate(zip(rewritten, notes, strict=True)):
      after = count(layer, context, models.names.prefix(first + i))
      savings.append([_saving(name, before[i], after, own)])
    return state, rewritten, savings

  def counted_outer(
    context: Context, state: State, given: models.Params
  ) -> tuple[models.Params, list[Saving]]:
    if outer is None:
      return given, [Saving(name, 0, 0, [])]
    before = count(given, context)
    rewritten, notes = outer(context, state, given)
    return rewritten, [_saving(name, before, count(rewritten, context), notes)]

  def skipped(context: Context, state: State, first: int, given: Layers) -> State:
    if skip is not None:
      return skip(context, state, first, given)
    return state if layers is None else layers(context, state, first, given)[0]

  return Transform((name,), init, counted_layers, counted_outer, skipped)


def chain(*transforms: Transform) -> Transform:
  """Makes one transform that applies several in order."""

  def init(context: Context) -> State:
    return tuple(transform.init(context) for transform in transforms)

  def layers(
    context: Context, state: State, first: int, given: Layers
  ) -> tuple[State, Layers, list[list[Saving]]]:
    states: list[State] = []
    savings: list[list[Saving]] = [[] for _ in given]
    for transform, own in zip(transforms, state, strict=True):
      own, given, found = transform.layers(context, own, first, given)
      states.append(own)
      for saved, more in zip(savings, found, strict=True):
        saved += more
    return tuple(states), given, savings

  def outer(
    context: Context, state: State, given: models.Params
  ) -> tuple[models.Params, list[Saving]]:
    savings: list[Saving] = []
    for transform, own in zip(transforms, state, strict=True):
      given, found = transform.outer(context, own, given)
      savings += found
    return given, savings

  def skip(context: Context, state: State, first: int, given: Layers) -> State:
    return tuple(
      transform.skip(context, own, first, given)
      for transform, own in zip(transforms, state, strict=True)
    )

  names = tuple(name for transform in transforms for name in transform.names)
  return Transform(names, init, layers, outer, skip)


class Record(NamedTuple):
  """A part of a model that is stored and decoded on its own.

  Attributes:
    name: 'layers.0', 'layers.1', ..., 'embed', 'final_norm' or 'head'.
    params: the parameters as they are stored: NumPy arrays and structured leaves.
    savings: the saving of each transform. The first unit outside the layers has the
      savings of all units outside the layers; the others have none.
  """

  name: str
  params: models.Params
  savings: list[Saving]


def make_context(
  source: Source,
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
  kinds: dict[str, np.dtype] = {}
  sizes = collections.Counter[np.dtype]()
  records = [record for record in source.records if record != models.names.BUFFERS]
  for record in records:
    for path, leaf in structured.flatten(source.specs(record)).items():
      kind = np.dtype(leaf.dtype)
      if jnp.issubdtype(kind, jnp.floating):
        kind = kind if stored_as is None else np.dtype(jnp.dtype(stored_as))
        sizes[kind] += int(np.prod(leaf.shape))
      kinds[path] = kind
  dtype = sizes.most_common(1)[0][0] if sizes else np.dtype(np.float32)
  return Context(source, kinds, dtype, mesh)


def rewrite(
  context: Context,
  transform: Transform,
  *,
  rounding: Rounding | None = NEAREST,
  layers: range | None = None,
  state: State | None = None,
  outer: bool = True,
) -> Iterator[tuple[list[Record], State]]:
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
    Complete units, and the state after them.
  """
  count_layers = context.config.num_layers
  layers = range(count_layers) if layers is None else layers
  step = 1 if context.mesh is None else context.mesh.size
  if state is None:
    state = transform.init(context)
    for first in range(0, layers.start, step):
      stop = min(first + step, layers.start)
      given = _given_layers(context, range(first, stop), rounding is not None)
      state = transform.skip(context, state, first, given)
  for first in range(layers.start, layers.stop, step):
    indices = range(first, min(first + step, layers.stop))
    given = _given_layers(context, indices, rounding is not None)
    state, given, savings = transform.layers(context, state, first, given)
    units = []
    for i, saved in zip(indices, savings, strict=True):
      prefix = models.names.prefix(i)
      stored, more = _stored(given.pop(0), context, prefix, rounding)
      units.append(Record(models.names.layer(i), stored, saved + more))
    yield units, state
  if outer:
    if context.mesh is not None:
      # The state is on the device of the last layer. The parameters outside the layers
      # are on the first device.
      state = _on_device(state, context.mesh.devices.flat[0])
    given_outer: models.Params = {}
    for name, tree in context.source.outer().items():
      # One by one, because both dtypes of a parameter are in memory meanwhile.
      given_outer |= _given({name: tree}, rounding is not None)
    given_outer, saved = transform.outer(context, state, given_outer)
    units = []
    for name in list(given_outer):
      stored, more = _stored({name: given_outer.pop(name)}, context, '', rounding)
      units.append(Record(name, stored, more if units else saved + more))
    yield units, state


def run_chain(
  transforms: tuple[Transform, ...],
  model: models.Model,
  *,
  rounding: Rounding | None = NEAREST,
) -> tuple[models.Model, list[Saving]]:
  """Applies transforms, in order, to a whole model in memory.

  Args:
    transforms: the transforms.
    model: the model. If its `stored_as` is set, that is the dtype to round to.
    rounding: see `rewrite`.

  Returns:
    The rewritten model, with NumPy arrays, and one saving for each transform; a chain
    among them counts as its transforms.
  """
  context = make_context(model, stored_as=model.stored_as)
  whole = chain(*transforms)
  totals = [Saving(name, 0, 0, []) for name in whole.names]
  units: list[Record] = []
  for some, _ in rewrite(context, whole, rounding=rounding):
    for unit in some:
      own = [saving for saving in unit.savings if saving.name != ROUNDING]
      totals = add_savings(totals, own)
      units.append(unit)
  return to_model(model.config, units, model.buffers), totals


def to_model(
  config: models.ModelConfig,
  units: Iterable[Record],
  buffers: dict[str, Any] | None = None,
) -> models.Model:
  """Makes a model from all units that `rewrite` yields."""
  layers: list[models.Params] = []
  outer: models.Params = {}
  for unit in units:
    if models.names.layer_index(unit.name) is not None:
      layers.append(unit.params)
    else:
      outer |= unit.params
  return models.from_layers(config, outer, layers, buffers)


def add_savings(totals: list[Saving], more: list[Saving]) -> list[Saving]:
  """Adds the savings of a unit to the totals, transform by transform.

  Args:
    totals: one saving for each transform, in order.
    more: the savings of one unit in the same order, or an empty list.

  Returns:
    The new totals, with the names of `totals`.
  """
  summed = []
  for i, total in enumerate(totals):
    own = [more[i]] if i < len(more) else []
    summed.append(
      Saving(
        total.name,
        total.numbers + sum(x.numbers for x in own),
        total.bytes + sum(x.bytes for x in own),
        total.notes + [note for x in own for note in x.notes],
      )
    )
  return summed


def note(path: str, leaf: Any, *, error: float = 0.0, **details: Any) -> Note:
  """Makes a note on one tensor.

  Args:
    path: path of the parameter, as in `leaves`.
    leaf: the array or structured leaf that now stands for the parameter, unstacked.
    error: relative error of the leaf, in the Frobenius norm.
    details: further JSON values.
  """
  return {
    'tensor': path,
    'form': leaf.kind if structured.is_structured(leaf) else 'array',
    'shape': list(leaf.shape),
    **details,
    'numbers': structured.count_elements(leaf),
    'error': three_digits(error),
  }


def three_digits(number: Any) -> float | None:
  """Returns a number rounded as in notes; None if it is not finite."""
  return float(f'{float(number):.3g}') if np.isfinite(number) else None


def leaves(model: models.Model) -> Iterator[tuple[str, Any]]:
  """Yields each leaf, unstacked, with a path like 'layers.0/attention/query/kernel'."""
  yield from structured.flatten(model.outer()).items()
  for i, layer in enumerate(model.layers()):
    for path, leaf in structured.flatten(layer).items():
      yield models.names.prefix(i) + path, leaf


def count_model(model: models.Model) -> tuple[int, int]:
  """Returns how many numbers a model stores, and their bytes before coding."""
  context = make_context(model, stored_as=model.stored_as)
  trees = [('', model.outer())]
  trees += [(models.names.prefix(i), layer) for i, layer in enumerate(model.layers())]
  counts = [count(tree, context, prefix) for prefix, tree in trees]
  buffers = structured.count_elements(model.buffers)
  numbers, size = buffers, structured.count_bytes(model.buffers)
  return numbers + sum(n for n, _ in counts), size + sum(b for _, b in counts)


def count(tree: models.Params, context: Context, prefix: str = '') -> tuple[int, int]:
  """Counts the numbers and bytes of unstacked parameters, rounded but not coded.

  Args:
    tree: parameters of a layer, or parameters outside the layers.
    context: see `make_context`; it has the dtypes to which the parameters are rounded.
    prefix: the prefix of the parameters' paths in the whole model.

  Returns:
    The number of numbers and the number of bytes.
  """
  numbers, size = 0, 0
  for path, leaf in structured.flatten(tree).items():
    kind = context.dtypes.get(prefix + path, context.dtype)
    as_stored = functools.partial(structured.astype, dtype=kind)
    # The sizes of leaves on a device follow from shapes alone. The sizes of structured
    # leaves on the host may depend on their numbers.
    on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves(leaf))
    whole = on_device or not structured.is_structured(leaf)
    rounded = jax.eval_shape(as_stored, leaf) if whole else as_stored(leaf)
    numbers += structured.count_elements(rounded)
    size += structured.count_bytes(rounded)
  return numbers, size


def _saving(
  name: str, before: tuple[int, int], after: tuple[int, int], notes: list[Note]
) -> Saving:
  return Saving(name, before[0] - after[0], before[1] - after[1], notes)


# ---- between the source and the transforms -----------------------------------------


def _given_layers(context: Context, indices: range, widen: bool) -> Layers:
  devices = [None] if context.mesh is None else list(context.mesh.devices.flat)
  return [
    _given(context.source.layer(i), widen, devices[k % len(devices)])
    for k, i in enumerate(indices)
  ]


def _on_device(state: State, device: Any) -> State:
  put = lambda x: jax.device_put(x, device) if isinstance(x, jax.Array) else x
  return jax.tree.map(put, state)


def _given(tree: models.Params, widen: bool, device: Any = None) -> models.Params:
  """Returns the parameters for a transform: float32 on a device, or as stored."""
  flat = structured.flatten(tree)
  if widen:
    return structured.unflatten(_widen(jax.device_put(flat, device)))
  for path, leaf in flat.items():
    if isinstance(leaf, structured.UniformlyQuantized):
      flat[path] = leaf.materialize()
  return structured.unflatten(flat)


def _stored(
  tree: models.Params, context: Context, prefix: str, rounding: Rounding | None
) -> tuple[models.Params, list[Saving]]:
  """Rounds matrices to their steps on their device, and fetches all parameters once.

  Returns:
    The parameters as they are stored, and the saving of the rounding, if there is one.
  """
  flat = structured.flatten(tree)
  if rounding is None:
    return structured.unflatten(jax.device_get(flat)), []
  effects, nearest = {}, {}
  for path, leaf in flat.items():
    dtype = context.dtypes.get(prefix + path, context.dtype)
    is_on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves(leaf))
    is_vector = structured.is_plain(leaf) and not is_matrix(leaf)
    octaves = None
    if is_on_device and not is_vector:
      octaves = rounding.octaves(prefix + path, dtype)
    if octaves is None:
      nearest[path] = dtype
      continue
    flat[path], effects[path] = round_leaf(
      leaf, dtype, octaves, rounding.uniform, rounding.inputs.get(prefix + path)
    )
  flat, effects = jax.device_get((flat, effects))
  # On the host, because these are vectors as a rule, and a program for so few numbers
  # takes longer to compile.
  flat |= {
    path: structured.astype(flat[path], dtype) for path, dtype in nearest.items()
  }
  notes, bits = [], 0.0
  for path, effect in effects.items():
    if effect.step:
      error = np.sqrt(effect.squares / max(effect.norm, 1e-30))
      step = {'step': three_digits(effect.step), 'error': three_digits(error)}
      notes.append({'tensor': prefix + path, **step})
      bits += float(effect.bits)
  saved = [Saving(ROUNDING, 0, int(bits / 8), notes)] if notes else []
  return structured.unflatten(flat), saved


ROUNDING = 'rounding'
"""Name of the saving that rounding to a coarser step makes."""


@jax.jit
def _widen(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns leaves in float32; a transform gets the arrays of `UniformlyQuantized`."""
  arrays = {
    path: leaf.materialize()
    if isinstance(leaf, structured.UniformlyQuantized)
    else leaf
    for path, leaf in flat.items()
  }
  return structured.astype(arrays, jnp.float32)


# ---- a function of one layer over several ------------------------------------------


def _kind(x: Any) -> Any:
  return tuple(np.shape(x)), str(jnp.result_type(x))


@functools.cache
def _jitted(core: Callable[..., Any], settings: tuple[Any, ...]) -> Callable[..., Any]:
  return jax.jit(functools.partial(core, **dict(settings)))


@functools.cache
def _sharded(
  core: Callable[..., Any], settings: tuple[Any, ...], mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  one = functools.partial(core, **dict(settings))

  def local(arguments: Any) -> Any:  # applies `core` to the layer of one device
    result = one(*jax.tree.map(lambda x: x[0], arguments))
    return jax.tree.map(lambda x: x[None], result)

  spec = jax.sharding.PartitionSpec('layers')
  return jax.jit(
    jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  )


def _map_over_mesh(
  core: Callable[..., Any],
  arguments: Sequence[tuple[Any, ...]],
  settings: tuple[Any, ...],
  mesh: jax.sharding.Mesh,
) -> list[Any]:
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('layers'))
  devices = list(mesh.devices.flat)

  def join(*layers: Any) -> jax.Array:
    shards = [jax.device_put(x, d)[None] for x, d in zip(layers, devices, strict=True)]
    shape = (len(shards), *shards[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)

  joined = jax.tree.map(join, *arguments)
  results = _sharded(core, settings, mesh)(joined)
  placed = jax.tree.map(
    lambda x: {shard.device: shard.data for shard in x.addressable_shards}, results
  )
  is_placed = lambda x: isinstance(x, dict) and all(k in x for k in devices)
  return [
    jax.tree.map(lambda x, d=device: x[d][0], placed, is_leaf=is_placed)
    for device in devices
  ]
