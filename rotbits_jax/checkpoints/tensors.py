"""Conversion between the named tensors of a checkpoint and the parameters of a model.

A tensor may differ from the parameters that it holds: it may be transposed, and it may
hold several parameters, stacked along its first axis. Two factors may stand for a
weight, see `factors`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import factors
from rotbits_jax.checkpoints import families


class ExpectedTensor(NamedTuple):
  """A tensor that a checkpoint with a given config must have.

  Attributes:
    name: name of the tensor in the checkpoint.
    shape: shape of the tensor.
    paths: paths of the parameters that it holds, stacked along its first axis.
    lengths: length of each parameter's part along the first axis.
    transposed: whether the tensor is `[out, in]` and the parameters are `[in, out]`.
    factored: the factors that stand for the tensor; None if it is stored itself.
  """

  name: str
  shape: tuple[int, ...]
  paths: tuple[str, ...]
  lengths: tuple[int, ...]
  transposed: bool
  factored: factors.Factored | None = None

  def stored(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensor or of its factors, by name."""
    if self.factored is None:
      return {self.name: self.shape}
    names = self.factored.names_of(self.name)
    (rows, columns), rank = self.shape, self.factored.rank
    return {names.left: (rows, rank), names.right: (rank, columns)}

  def parameters(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters by path."""
    parts = [(length, *self.shape[1:]) for length in self.lengths]
    shapes = [part[::-1] for part in parts] if self.transposed else parts
    return dict(zip(self.paths, shapes, strict=True))

  def read(self, stored: Iterable[Any]) -> dict[str, Any]:
    """Returns the parameters by path, as views.

    Args:
      stored: the tensor, or its two factors.
    """
    stored = list(stored)
    if self.factored is not None:
      u, v = [x.T for x in stored[::-1]] if self.transposed else stored
      return {self.paths[0]: structured.LowRank(u, v, names=self.factored.names)}
    if len(self.paths) > 1:
      parts = np.split(stored[0], np.cumsum(self.lengths)[:-1])
    else:
      parts = list(stored)
    parts = [part.T for part in parts] if self.transposed else parts
    return dict(zip(self.paths, parts, strict=True))

  def check(self, path: str, leaf: Any) -> None:
    """Checks that a parameter has the factors that are stored, if any are.

    Raises:
      ValueError: if it has not.
    """
    found = factored_leaves({path: leaf}).get(path)
    if self.factored not in (None, found):
      raise ValueError(f'{path}: expected factors, {self.factored}, got {found}')

  def write(self, leaves: Sequence[Any]) -> dict[str, list[np.ndarray]]:
    """Returns the parts of each stored tensor along its first axis, by its name.

    Args:
      leaves: the parameters in the order of `paths`. Structured leaves are
        materialized, unless factors are stored.
    """
    if self.factored is not None:
      pair = leaves[0].pair()
      pair = pair.T if self.transposed else pair
      stored = zip(self.stored(), (pair.u, pair.v), strict=True)
      return {name: [np.asarray(factor)] for name, factor in stored}
    arrays = [np.asarray(leaf) for leaf in structured.materialize(list(leaves))]
    return {self.name: [x.T for x in arrays] if self.transposed else arrays}


def entries(
  config: models.ModelConfig, factored: Mapping[str, factors.Factored] | None = None
) -> dict[str, list[ExpectedTensor]]:
  """Returns the tensors of a checkpoint by record, see `models.names`.

  Args:
    config: sizes and switches.
    factored: the weights that are stored as factors, by path.
  """
  family, factored = families.family(config.family), factored or {}
  found = {}
  for index in range(config.num_layers):
    name = models.names.layer(index)
    prefix = f'{family.layer_prefix}{index}.'
    shapes = models.layer_shapes(config, index)
    found[name] = _entries(family.layer, shapes, prefix, f'{name}/', factored)
  return found | outer_entries(config, factored)


def outer_entries(
  config: models.ModelConfig, factored: Mapping[str, factors.Factored] | None = None
) -> dict[str, list[ExpectedTensor]]:
  """Returns the tensors outside the layers by record, see `entries`."""
  rows, shapes = families.family(config.family).outer, models.outer_shapes(config)
  found: dict[str, list[ExpectedTensor]] = {}
  for entry in _entries(rows, shapes, '', '', factored or {}):
    found.setdefault(entry.paths[0].split('/')[0], []).append(entry)
  return found


def _entries(
  rows: Sequence[families.TensorRow],
  shapes: models.Params,
  prefix: str,
  path_prefix: str,
  factored: Mapping[str, factors.Factored],
) -> list[ExpectedTensor]:
  flat, found, renamed = structured.flatten(shapes), [], {}
  for row in rows:
    if row.paths[0] not in flat:  # the model has no such tensor
      continue
    parts = [flat[path] for path in row.paths]
    parts = [part[::-1] for part in parts] if row.transposed else parts
    lengths = tuple(part[0] for part in parts)
    shape, name = (sum(lengths), *parts[0][1:]), prefix + row.name
    paths = tuple(path_prefix + path for path in row.paths)
    pair = factored.get(paths[0]) if len(paths) == 1 else None
    if pair is not None:
      renamed[f'{name.removesuffix(".weight")}.bias'] = pair.names_of(name).bias
    name = renamed.get(name, name)
    found.append(ExpectedTensor(name, shape, paths, lengths, row.transposed, pair))
  return found


def factored_leaves(leaves: Mapping[str, Any]) -> dict[str, factors.Factored]:
  """Returns how the pairs of factors among some leaves are stored, by path."""
  return {
    path: factors.Factored(*leaf.factored)
    for path, leaf in leaves.items()
    if structured.is_structured(leaf) and leaf.factored is not None
  }


def leaves_of(model: models.Model) -> dict[str, Any]:
  """Returns the unstacked leaves of a model by path, each of which needs no other."""
  found = dict(model.leaves())
  for path, leaf in found.items():
    if structured.is_structured(leaf) and leaf.needs:
      own = {x: found[x] for x in (path, *leaf.needs)}
      found[path] = structured.expand(own)[path]
  return found


def to_tensors(model: models.Model) -> dict[str, np.ndarray]:
  """Makes the tensors of a checkpoint from a model: the inverse of `from_tensors`.

  Args:
    model: the model. Structured leaves are materialized, except pairs of factors.

  Returns:
    The tensors by their names in the checkpoint.
  """
  leaves = leaves_of(model)
  tensors = {name: np.asarray(x) for name, x in model.buffers.items()}
  for own in entries(model.config, factored_leaves(leaves)).values():
    for entry in own:
      found = entry.write([leaves[path] for path in entry.paths])
      for name, parts in found.items():
        tensors[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
  return tensors
