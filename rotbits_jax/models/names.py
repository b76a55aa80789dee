"""Names of parameters, of the records that hold them, and of stacks of layers.

The path of a parameter is its keys joined by '/', like 'layers.3/mlp/up/kernel' or
'embed/tokens'. A record is a part of a model that is stored on its own; its name is the
first key of these paths. In memory, consecutive layers of the same shapes are stacked:
'layers.2:5' holds layers 2, 3 and 4 along a leading axis.
"""

from collections.abc import Iterable
import re

_INDEX = '(0|[1-9][0-9]{0,6})'

BUFFERS = 'buffers'
"""Name of the record of the tensors that the forward pass does not use."""


def subspace(segment: int) -> str:
  """Returns the name of the record of a segment's basis, see `structured.subspaces`."""
  return f'subspaces.{segment}'


def basis(segment: int) -> str:
  """Returns the path of a segment's basis."""
  return f'{subspace(segment)}/basis'


def subspace_index(path: str) -> int | None:
  """Returns the segment of a path or of a record of a basis; None for others."""
  match = re.match(rf'subspaces\.{_INDEX}(/basis)?\Z', path)
  return None if match is None else int(match[1])


def layer(index: int) -> str:
  """Returns the name of the record of a layer."""
  return f'layers.{index}'


def stack(layers: range) -> str:
  """Returns the name of a stack of consecutive layers."""
  return f'layers.{layers.start}:{layers.stop}'


def prefix(index: int | None) -> str:
  """Returns the beginning of the paths in a layer; '' outside the layers, for None."""
  return '' if index is None else f'{layer(index)}/'


def layer_index(path: str) -> int | None:
  """Returns the layer of a path or a record; None for others and for stacks."""
  match = re.match(rf'layers\.{_INDEX}(?:/|\Z)', path)
  return None if match is None else int(match[1])


def stacked_layers(path: str) -> range | None:
  """Returns the layers of a stack, given its name or a path in it; None elsewhere."""
  match = re.match(rf'layers\.{_INDEX}:{_INDEX}(/|\Z)', path)
  return None if match is None else range(int(match[1]), int(match[2]))


def stacks(keys: Iterable[str]) -> tuple[range, ...]:
  """Returns the layers of each stack among the keys of a model, in order."""
  stacked = filter(None, map(stacked_layers, keys))
  return tuple(sorted(stacked, key=lambda layers: layers.start))
