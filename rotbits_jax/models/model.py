"""The in-memory form of a model: parameters as a Flax PyTree, layers stacked."""

from collections.abc import Iterable, Iterator
import dataclasses
import itertools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib

Params = dict[str, Any]


@struct.dataclass
class Model:
  """A dense or sliced transformer.

  `params` is what `Transformer(config, group_sizes)` takes: `embed`, `head`
  (unless tied), `final_norm` (dense models), and `blocks_0`, `blocks_1`, ...:
  runs of consecutive layers whose parameters have the same shapes, dtypes and
  kinds, stacked along a leading axis. Kernels are `[N, in, out]`. A leaf is an array
  or a structured leaf.

  Attributes:
    params: the parameters.
    buffers: tensors of the checkpoint that take no part in the mathematics, by
      their name there.
    config: sizes and switches.
    stored_as: name of the format that float32 parameters will be rounded to, while a
      chain of transforms works on the model; None where they are what is stored.
  """

  params: Params
  buffers: dict[str, Any]
  config: config_lib.ModelConfig = struct.field(pytree_node=False)
  stored_as: str | None = struct.field(pytree_node=False, default=None)

  @property
  def group_sizes(self) -> tuple[int, ...]:
    """How many layers each `blocks_i` stacks."""
    sizes: list[int] = []
    while f'blocks_{len(sizes)}' in self.params:
      leaves = jax.tree.leaves(self.params[f'blocks_{len(sizes)}'])
      sizes.append(leaves[0].shape[0])
    return tuple(sizes)

  def outer(self) -> Params:
    """The parameters outside the layers."""
    return {k: v for k, v in self.params.items() if not k.startswith('blocks_')}

  def layers(self) -> Iterator[Params]:
    """The layers' parameters in order, unstacked."""
    for group, size in enumerate(self.group_sizes):
      for index in range(size):
        yield unstack_layer(self.params[f'blocks_{group}'], index)

  def layer(self, index: int) -> Params:
    """The parameters of one layer, unstacked."""
    for group, size in enumerate(self.group_sizes):
      if index < size:
        return unstack_layer(self.params[f'blocks_{group}'], index)
      index -= size
    raise IndexError(f'the model has {self.config.num_layers} layers')

  def specs(self, index: int | None) -> Params:
    """What `layer` returns, or `outer` for None: shapes and dtypes are known."""
    return self.outer() if index is None else self.layer(index)

  def rounded(self) -> 'Model':
    """The model as it is stored: rounded to `stored_as`, where that is set.

    Raises:
      ValueError: if a number is too large for that dtype.
    """
    if self.stored_as is None:
      return self
    dtype = np.dtype(jnp.dtype(self.stored_as))
    params = structured.astype(jax.device_get(self.params), dtype)
    for path, leaf in structured.flatten(params).items():
      if not all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(leaf)):
        raise ValueError(f'{path} has numbers that {dtype} cannot hold')
    return dataclasses.replace(self, params=params, stored_as=None)

  def materialize(
    self, *, but: tuple[type[structured.Structured], ...] = ()
  ) -> 'Model':
    """The model with structured leaves replaced by the arrays they stand for.

    Args:
      but: kinds of leaves that stay.

    Returns:
      The model.
    """
    return dataclasses.replace(self, params=materialize(self.params, but=but))


def materialize(
  params: Params, *, but: tuple[type[structured.Structured], ...] = ()
) -> Params:
  """Replaces structured leaves by the arrays they stand for.

  Args:
    params: nested dicts that hold the parameters that leaves need.
    but: kinds of leaves that stay.

  Returns:
    The parameters.
  """
  own = {
    path: leaf
    if isinstance(leaf, (*but, structured.Dependent))
    else structured.materialize(leaf)
    for path, leaf in structured.flatten(params).items()
  }
  return expand(structured.unflatten(own), but=but)


def expand(
  params: Params, *, but: tuple[type[structured.Structured], ...] = ()
) -> Params:
  """Replaces leaves that need other parameters by the arrays they stand for.

  Args:
    params: nested dicts that hold the parameters that such leaves need.
    but: kinds of leaves that stay.

  Returns:
    The parameters.
  """
  flat = structured.flatten(params)
  expanded = {
    path: leaf.expand(*(structured.materialize(flat[name]) for name in leaf.needs))
    for path, leaf in flat.items()
    if isinstance(leaf, structured.Dependent) and not isinstance(leaf, but)
  }
  return structured.unflatten(flat | expanded)


def unstack_layer(block: Params, index: int) -> Params:
  """One layer of a stacked block."""
  return jax.tree.map(
    lambda x: x.layer(index) if structured.is_structured(x) else x[index],
    block,
    is_leaf=structured.is_structured,
  )


def from_layers(
  config: config_lib.ModelConfig,
  outer: Params,
  layers: list[Params],
  buffers: dict[str, Any] | None = None,
  stored_as: str | None = None,
) -> Model:
  """Stacks runs of alike layers: the inverse of `outer` and `layers`.

  Args:
    config: sizes and switches.
    outer: the parameters outside the layers.
    layers: the L layers' parameters in order.
    buffers: see `Model.buffers`.
    stored_as: see `Model.stored_as`.

  Returns:
    The model.
  """
  params = dict(outer)
  runs = [list(run) for _, run in itertools.groupby(layers, stack_key)]
  for i, run in enumerate(runs):
    params[f'blocks_{i}'] = stack_layers(run, len(run))
  return Model(params, buffers or {}, config, stored_as)


def stack_layers(layers: Iterable[Params], count: int) -> Params:
  """Stacks alike layers: the inverse of `unstack_layer`.

  Args:
    layers: `count` layers whose leaves have the same shapes, dtypes and kinds. Arrays
      are copied as they come, so an iterator need not hold more than one layer.
    count: how many.

  Returns:
    The block; NumPy arrays where the layers' are, else JAX arrays.
  """
  stacks: list[Any] = []
  treedef = None
  for index, layer in enumerate(layers):
    leaves, treedef = jax.tree.flatten(layer, is_leaf=structured.is_structured)
    if not stacks:
      # NumPy arrays are copied into place; the others are few or on a device.
      stacks = [
        np.empty((count, *x.shape), x.dtype) if isinstance(x, np.ndarray) else []
        for x in leaves
      ]
    for stack, leaf in zip(stacks, leaves, strict=True):
      if isinstance(stack, list):
        stack.append(leaf)
      else:
        stack[index] = leaf
  joined = [_join(x) if isinstance(x, list) else x for x in stacks]
  return jax.tree.unflatten(treedef, joined)


def _join(leaves: list[Any]) -> Any:
  if structured.is_structured(leaves[0]):
    return type(leaves[0]).stack(leaves)
  return jnp.stack(leaves)


def stack_key(layer: Params) -> tuple[Any, ...]:
  """Equal for layers that can share a stack: the one rule for which layers do."""
  return tuple(
    (path, *structured.stack_key(leaf))
    for path, leaf in sorted(structured.flatten(layer).items(), key=lambda x: x[0])
  )
