"""Names of parameters, and of the units that hold them.

The path of a parameter is its keys joined by '/', like 'layers.3/mlp/up/kernel' or
'embed/tokens'. A unit is a part of a model that is stored on its own; its name is the
first key of these paths.
"""

import re


def layer(index: int) -> str:
  """Returns the name of the unit of a layer."""
  return f'layers.{index}'


def prefix(index: int | None) -> str:
  """Returns the beginning of the paths in a layer; '' outside the layers, for None."""
  return '' if index is None else f'{layer(index)}/'


def layer_index(path: str) -> int | None:
  """Returns the index of the layer of a path or of a unit; None outside the layers."""
  match = re.match(r'layers\.(0|[1-9][0-9]{0,6})(/|\Z)', path)
  return None if match is None else int(match[1])


def kind(path: str) -> str:
  """Returns a path with '*' for the index of the layer."""
  return path if layer_index(path) is None else f'layers.*/{path.partition("/")[2]}'
