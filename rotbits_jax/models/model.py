"""A model in memory: its parameters as a PyTree with stacked layers.

Consecutive layers of the same shapes are stacked along a leading axis. To materialize a
structured leaf is to replace it by the array that it stands for, see `structured`.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import meshes
from rotbits_jax.models import names

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
  """A dense or sliced transformer.

  `params` has the keys `embed`, `head` (unless tied), `final_norm` (dense models only),
  and `layers.I:J` for each stack of the N layers I to J - 1, whose parameters have the
  same shapes, dtypes and types. Kernels of a stack are `[N, in, out]`. A leaf is an
  array or a structured leaf.
  """

  params: Params
  buffers: dict[str, Any]  # tensors that the forward pass does not use, by name
  config: config_lib.ModelConfig = structured.static()
  # Dtype to which float32 parameters are still to be rounded; None if they have it.
  stored_as: str | None = structured.static(default=None)

  def replace(self, **fields: Any) -> Self:
    """Returns a copy with other values of these fields."""
    return dataclasses.replace(self, **fields)

  def __repr__(self) -> str:
    """Returns one line: a notebook would print every element of the parameters."""
    elements = sum(np.size(x) for x in jax.tree.leaves(self.params))
    config, sliced = self.config, 'sliced' if self.config.sliced else 'dense'
    sizes = f'{config.num_layers} layers, {elements:,} elements'
    return f'Model({config.family}, {sliced}, {sizes})'

  @property
  def stacks(self) -> tuple[range, ...]:
    """The layers of each stack, in order."""
    return names.stacks(self.params)

  def outer(self) -> Params:
    """Returns the parameters outside the layers."""
    outer = {k: v for k, v in self.params.items() if not names.stacked_layers(k)}
    return meshes.automatic(outer)

  def layers(self) -> Iterator[Params]:
    """Yields the parameters of each layer in order, unstacked."""
    yield from map(self.layer, itertools.chain(*self.stacks))

  def layer(self, index: int) -> Params:
    """Returns the parameters of one layer, unstacked; an IndexError without it."""
    for stack in (x for x in self.stacks if index in x):
      name = names.stack(stack)
      for path, leaf in structured.flatten(self.params[name]).items():
        if leaf.shape[:1] != (len(stack),):  # JAX would clip the index
          text = f'must have {len(stack)} layers, got {leaf.shape=}'
          raise ValueError(f'{name}/{path} {text}')
      return unstack_layer(self.params[name], index - stack.start)
    raise IndexError(f'the model has the layers {self.stacks}, got {index}')

  def leaves(self) -> Iterator[tuple[str, Any]]:
    """Yields each leaf, unstacked, with a path like 'layers.0/attention/out/kernel'."""
    yield from structured.flatten(self.outer()).items()
    for record in map(names.layer, itertools.chain(*self.stacks)):
      yield from structured.flatten(self.read(record)).items()

  @property
  def records(self) -> tuple[str, ...]:
    """Names of the records: the layers, those outside the layers, and the buffers."""
    layers = map(names.layer, itertools.chain(*self.stacks))
    return (*layers, *self.outer(), *([names.BUFFERS] if self.buffers else []))

  def read(self, record: str) -> Params:
    """Returns a record, unstacked: nested dicts with the record as their only key."""
    if record == names.BUFFERS:
      return {record: self.buffers}
    index = names.layer_index(record)
    return {record: self.outer()[record] if index is None else self.layer(index)}

  specs = read  # leaves with the shapes and dtypes of a record: the record itself

  def rounded(self) -> 'Model':
    """Rounds the parameters to `stored_as`; a ValueError if one is too large for it."""
    if self.stored_as is None:
      return self
    dtype = np.dtype(jnp.dtype(self.stored_as))
    params = structured.astype(jax.device_get(self.params), dtype)
    for path, leaf in structured.flatten(params).items():
      if not all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(leaf)):
        raise ValueError(f'{path} has elements that {dtype} cannot hold')
    return dataclasses.replace(self, params=params, stored_as=None)

  def materialize(self) -> 'Model':
    """Replaces structured leaves by their arrays, see `structured.expand`."""
    params = structured.expand(structured.flatten(self.params))
    return dataclasses.replace(self, params=structured.unflatten(params))


def unstack_layer(stack: Params, place: int) -> Params:
  """Returns a layer of a stack by its place in it."""
  unstacked = lambda x: x.layer(place) if structured.is_structured(x) else x[place]
  stack = meshes.automatic(stack)
  return jax.tree.map(unstacked, stack, is_leaf=structured.is_structured)


def from_layers(
  config: config_lib.ModelConfig,
  outer: Params,
  layers: list[Params],
  buffers: dict[str, Any] | None = None,
) -> Model:
  """Makes a model from its layers in order: the inverse of `outer` and `layers`."""
  params = dict(outer)
  key = lambda index: stack_key(layers[index])
  for stack in stack_ranges(range(len(layers)), key):
    run = layers[stack.start : stack.stop]
    params[names.stack(stack)] = stack_layers(run, len(run))
  return Model(params, buffers or {}, config)


def stack_layers(layers: Iterable[Params], count: int) -> Params:
  """Stacks layers: the inverse of `unstack_layer`.

  >>> stack = stack_layers([{'scale': jnp.zeros(2)}, {'scale': jnp.ones(2)}], 2)
  >>> stack['scale'].tolist(), unstack_layer(stack, 1)['scale'].tolist()
  ([[0.0, 0.0], [1.0, 1.0]], [1.0, 1.0])

  Args:
    layers: the layers, with equal `stack_key`. NumPy arrays are copied one layer at a
      time, so an iterator does not need to hold more than one layer.
    count: the number of layers.

  Returns:
    The stack. Its arrays are NumPy arrays where the layers have NumPy arrays, and JAX
    arrays elsewhere.
  """
  stacks: list[Any] = []
  treedef = None
  for index, layer in enumerate(layers):
    leaves, treedef = jax.tree.flatten(layer, is_leaf=structured.is_structured)
    if not stacks:
      # Other leaves than NumPy arrays are few or are on a device.
      stacks = [
        np.empty((count, *x.shape), x.dtype) if isinstance(x, np.ndarray) else []
        for x in leaves
      ]
    for stack, leaf in zip(stacks, leaves, strict=True):
      if isinstance(stack, list):
        stack.append(leaf)
      else:
        stack[index] = leaf
  for i, stack in enumerate(stacks):
    if isinstance(stack, list):
      is_structured = structured.is_structured(stack[0])
      stacks[i] = type(stack[0]).stack(stack) if is_structured else jnp.stack(stack)
  return jax.tree.unflatten(treedef, stacks)


def stack_ranges(layers: range, key: Callable[[int], Any]) -> list[range]:
  """Divides the indices of layers into the fewest stacks whose layers have equal keys.

  >>> stack_ranges(range(3), key=lambda i: i < 2)
  [range(0, 2), range(2, 3)]
  """
  runs = [list(run) for _, run in itertools.groupby(layers, key)]
  return [range(run[0], run[-1] + 1) for run in runs]


def stack_key(layer: Params) -> tuple[Any, ...]:
  """Returns a key that is equal for two layers if they can share a stack."""
  flat = structured.flatten(layer)
  return tuple((path, *structured.stack_key(flat[path])) for path in sorted(flat))
