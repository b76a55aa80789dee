"""Transforms: functions that rewrite a model so that it stores fewer numbers.

A transform keeps the function that the model computes (or states how it changes it) and
puts structured leaves where arrays were. Transforms are chained like Optax's; any
NamedTuple of this form, a quantiser for instance, can stand in a chain.

Numbers are rounded once, when the chain ends: in between they are float32, and
`Model.stored_as` says what they will be rounded to.
"""

import collections
from collections.abc import Callable, Iterator
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured

Note = dict[str, Any]  # JSON values
Formats = dict[str, np.dtype]  # of each leaf, by its path


class Transform(NamedTuple):
  """One step of a chain.

  Attributes:
    name: what the report calls the saving.
    apply: takes a model and returns the rewritten model and notes on what was done
      where, one for each tensor or group concerned; the report shows them. In a chain
      it gets and returns float32 numbers; numbers of a leaf that are not to be rounded
      are kept by the leaf's `astype`.
  """

  name: str
  apply: Callable[[models.Model], tuple[models.Model, list[Note]]]


class Saving(NamedTuple):
  """What one transform saved."""

  name: str
  numbers: int
  bytes: int  # before coding
  notes: list[Note]


def run_chain(
  transforms: tuple[Transform, ...], model: models.Model, *, widen: bool = True
) -> tuple[models.Model, list[Saving]]:
  """Applies transforms in order and counts what each saves.

  Args:
    transforms: the chain.
    model: the model. One that has not been rounded yet, whose `stored_as` is set, goes
      through as it is: float32 all the way.
    widen: whether numbers are float32 between the transforms. Without, transforms get
      the numbers as they are stored, to keep them bit for bit.

  Returns:
    The rewritten model, in the formats that it had and with NumPy arrays, and one
    saving a transform.
  """
  if not transforms:
    return model, []
  savings = []
  numbers, size = count(model)
  others: Formats = {}
  if widen:
    model, others = _widened(model)
  for transform in transforms:
    model, notes = transform.apply(model)
    fewer_numbers, fewer_bytes = _count(model, others)
    savings.append(
      Saving(transform.name, numbers - fewer_numbers, size - fewer_bytes, notes)
    )
    numbers, size = fewer_numbers, fewer_bytes
  return _rounded(model, others) if widen else model, savings


def count(model: models.Model) -> tuple[int, int]:
  """How many numbers a model stores, and how many bytes they take uncoded."""
  return _count(model, {})


def _count(model: models.Model, others: Formats) -> tuple[int, int]:
  """What `count` returns, of a model that may have to be rounded yet."""
  numbers = structured.count_numbers(model.buffers)
  size = structured.count_bytes(model.buffers)
  for path, leaf in leaves(model):
    if model.stored_as is not None:
      form = others.get(path, storage_format(model))
      if structured.is_plain(leaf):  # most numbers: not rounded to be counted
        numbers, size = numbers + leaf.size, size + leaf.size * form.itemsize
        continue
      leaf = structured.astype(leaf, form)
    numbers += structured.count_numbers(leaf)
    size += structured.count_bytes(leaf)
  return numbers, size


def rounded(model: models.Model) -> models.Model:
  """A model as it is stored: rounded to `stored_as`, where that is set."""
  return model if model.stored_as is None else _rounded(model, {})


def note(path: str, leaf: Any, *, error: float = 0.0, **details: Any) -> Note:
  """A note on one tensor.

  Args:
    path: of the tensor, as `leaves` has it.
    leaf: what stands for it now, unstacked.
    error: relative error (Frobenius).
    details: further JSON values.
  """
  return {
    'tensor': path,
    'form': leaf.kind if structured.is_structured(leaf) else 'array',
    'shape': list(leaf.shape),
    **details,
    'numbers': structured.count_numbers(leaf),
    'error': three_digits(error),
  }


def three_digits(number: float) -> float:
  """A number as notes have it."""
  return float(f'{number:.3g}')


def roundoff(model: models.Model) -> float:
  """Unit roundoff of the format that a model's numbers are stored in.

  That of float32 is taken as what float32 arithmetic can tell, 2^-19.
  """
  least = 16 * float(jnp.finfo(jnp.float32).eps)
  return max(float(jnp.finfo(storage_format(model)).eps) / 2, least)


def storage_format(model: models.Model) -> np.dtype:
  """The format that a model's numbers are stored in: that of most of them."""
  if model.stored_as is not None:
    return np.dtype(jnp.dtype(model.stored_as))
  return _main_format(model)


def limit(model: models.Model) -> float:
  """The greatest finite number of the format that a model is stored in."""
  return float(jnp.finfo(storage_format(model)).max)


def is_within(tree: Any, greatest: float) -> bool:
  """Whether all numbers are finite and none exceeds the greatest."""
  return all(bool(np.all(np.abs(x) <= greatest)) for x in jax.tree.leaves(tree))


def leaves(model: models.Model) -> Iterator[tuple[str, Any]]:
  """The unstacked leaves with their paths, like 'layers.0/attention/query/kernel'."""
  trees = [('', model.outer())]
  trees += [(f'layers.{i}/', layer) for i, layer in enumerate(model.layers())]
  for prefix, tree in trees:
    found, _ = jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=structured.is_structured
    )
    for path, leaf in found:
      yield prefix + _joined(path), leaf


def _joined(path: tuple[Any, ...]) -> str:
  return '/'.join(part.key for part in path)


def _main_format(model: models.Model) -> np.dtype:
  """The floating-point format of most numbers."""
  sizes = collections.Counter[np.dtype]()
  for leaf in jax.tree.leaves(model.params):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      sizes[np.dtype(leaf.dtype)] += leaf.size
  return sizes.most_common(1)[0][0]


def _widened(model: models.Model) -> tuple[models.Model, Formats]:
  """The model in float32, and the formats of those leaves that were not in the main."""
  if model.stored_as is not None:
    return model, {}
  main = _main_format(model)
  others = {p: np.dtype(x.dtype) for p, x in leaves(model) if x.dtype != main}
  params = structured.astype(jax.device_get(model.params), np.float32)
  return dataclasses.replace(model, params=params, stored_as=main.name), others


def _rounded(model: models.Model, others: Formats) -> models.Model:
  """The inverse of `_widened`, up to rounding."""
  main = storage_format(model)

  def with_formats(tree: models.Params, prefix: str) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, x: structured.astype(x, others.get(prefix + _joined(path), main)),
      tree,
      is_leaf=structured.is_structured,
    )

  if not others:
    params = structured.astype(jax.device_get(model.params), main)
    return dataclasses.replace(model, params=params, stored_as=None)
  model = jax.device_get(model)
  layers = [with_formats(x, f'layers.{i}/') for i, x in enumerate(model.layers())]
  return models.from_layers(
    model.config, with_formats(model.outer(), ''), layers, model.buffers
  )
