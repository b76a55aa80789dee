"""Parts that other packages add: leaves, presets and coders, which have names in files.

A package offers a part as an entry point of the group `rotbits_jax.leaves`,
`rotbits_jax.presets` or `rotbits_jax.coders`, here in its pyproject.toml:

    [project.entry-points."rotbits_jax.coders"]
    zstd = "their_package.coder:CODER"

The package is imported when the name is met. A part need not be an entry point: whoever
imports its module may pass it as a value, or register it.
"""

from collections.abc import Mapping
import functools
import importlib.metadata
import sys
from typing import Any, Literal, TypeVar
import warnings

Group = Literal['leaves', 'presets', 'coders']
T = TypeVar('T')

_OWN = __name__.partition('.')[0]


def find(group: Group, name: str, known: Mapping[str, T]) -> T | None:
  """Returns the part of a name; None if no installed package has it.

  Args:
    group: the kind of part.
    name: name of the part.
    known: the parts that need no search, by name.

  Raises:
    ValueError: if the package cannot be imported.
  """
  if name in known:
    return known[name]
  for point in _points(group, tuple(sys.path)):
    if point.name == name:
      return _part(point)
  return None


def load(group: Group, known: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parts of other packages by name, without those of names in `known`.

  A part that cannot be imported is left out with a warning: who needs another one need
  not repair its package.
  """
  parts = {}
  for point in _points(group, tuple(sys.path)):
    if point.name not in known:
      try:
        parts[point.name] = _part(point)
      except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
  return parts


def package(group: Group, name: str, part: Any) -> str | None:
  """Returns the distribution that has a part; None for a part of this package.

  Args:
    group: the kind of part.
    name: name of the part.
    part: the part: a class, a function or another object.
  """
  module = getattr(part, '__module__', type(part).__module__).partition('.')[0]
  if module == _OWN:
    return None
  for point in _points(group, tuple(sys.path)):
    if point.name == name and point.dist is not None:
      return point.dist.name
  return importlib.metadata.packages_distributions().get(module, [module])[0]


def _part(point: importlib.metadata.EntryPoint) -> Any:
  """Imports the part of an entry point; a ValueError names the package."""
  try:
    return point.load()
  except Exception as error:  # whatever its module does
    owner = point.value if point.dist is None else point.dist.name
    what = f'{point.group} {point.name!r} of the package {owner!r}'
    cause = f'{type(error).__name__}: {error}'
    raise ValueError(f'{what} cannot be imported: {cause}') from error


@functools.cache
def _points(group: Group, path: tuple[str, ...]) -> importlib.metadata.EntryPoints:
  """Returns the entry points of a group on a path; finding them reads many files."""
  return importlib.metadata.entry_points(group=f'{_OWN}.{group}')
