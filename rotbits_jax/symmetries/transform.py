"""Transforms: functions that rewrite a model so that it stores fewer numbers.

A transform keeps the function that the model computes (or states how it changes it) and
puts structured leaves where arrays were. Transforms are chained like Optax's; any
NamedTuple of this form, a quantiser for instance, can stand in a chain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rotbits_jax import models
from rotbits_jax import structured

Note = dict[str, Any]  # JSON values


class Transform(NamedTuple):
  """One step of a chain.

  Attributes:
    name: what the report calls the saving.
    apply: takes a model and returns the rewritten model and notes on what was done
      where, one for each tensor or group concerned; the report shows them.
  """

  name: str
  apply: Callable[[models.SlicedModel], tuple[models.SlicedModel, list[Note]]]


class Saving(NamedTuple):
  """What one transform saved."""

  name: str
  numbers: int
  bytes: int  # before coding
  notes: list[Note]


def run_chain(
  transforms: tuple[Transform, ...], model: models.SlicedModel
) -> tuple[models.SlicedModel, list[Saving]]:
  """Applies transforms in order and counts what each saves.

  Args:
    transforms: the chain.
    model: the model.

  Returns:
    The rewritten model and one saving a transform.
  """
  savings = []
  numbers, size = count(model)
  for transform in transforms:
    model, notes = transform.apply(model)
    fewer_numbers, fewer_bytes = count(model)
    savings.append(
      Saving(transform.name, numbers - fewer_numbers, size - fewer_bytes, notes)
    )
    numbers, size = fewer_numbers, fewer_bytes
  return model, savings


def count(model: models.SlicedModel) -> tuple[int, int]:
  """How many numbers a model stores, and how many bytes they take uncoded."""
  trees = [model.outer(), model.buffers, *model.layers()]
  return (
    sum(structured.count_numbers(tree) for tree in trees),
    sum(structured.count_bytes(tree) for tree in trees),
  )
