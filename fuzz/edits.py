"""Edits of the JSON of a manifest that know what it consists of.

Nodes are grouped by their place, such as `records/*/leaves/*/shape`, and each place is
as likely to be edited, so fields that are rare are edited as often as others.
"""

from collections.abc import Callable, Iterator, Sequence
import copy
import random
from typing import Any, NamedTuple

from fuzz import containers

Key = str | int

_NUMBERS: tuple[Any, ...] = (
  *(-1, 0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 47, 1 << 53),
  *((1 << 63) - 1, 1 << 63, 10**30, 0.5, -0.5, 1e308, float('inf'), float('nan')),
  *(True, False),
)
_TYPES: tuple[Any, ...] = (None, True, -1, 1 << 40, 0.5, 'x', [], [[]], {}, {'x': 1})
_STRINGS = '', 'x', 'a/b', '../x', '/x', '\x1b[2J', '\ud800', 'x' * 300, 'head/kernel'


class Node(NamedTuple):
  """A node of a JSON value: `parent[key]`, at a place without the indices of lists."""

  parent: Any
  key: Key
  place: tuple[str, ...]

  @property
  def value(self) -> Any:
    """The value of the node."""
    return self.parent[self.key]


class Donors(NamedTuple):
  """Values of manifests of all kinds: at each place, and of each type."""

  of_place: dict[tuple[str, ...], list[Any]]
  strings: list[str]
  keys: list[str]

  @classmethod
  def of(cls, manifests: Sequence[containers.Json]) -> 'Donors':
    """Collects the values of manifests."""
    donors = cls({}, [], [])
    for manifest in manifests:
      for node in nodes(manifest):
        values = donors.of_place.setdefault(node.place, [])
        if len(values) < 50:
          values.append(node.value)
        if isinstance(node.value, str):
          donors.strings.append(node.value)
        donors.keys.append(str(node.key))
    unique = dict.fromkeys
    return cls(donors.of_place, [*unique(donors.strings)], [*unique(donors.keys)])


def nodes(value: Any, place: tuple[str, ...] = ()) -> Iterator[Node]:
  """Yields the nodes of a JSON value."""
  if isinstance(value, dict):
    keys: Any = value
  elif isinstance(value, list):
    keys = range(len(value))
  else:
    return
  for key in keys:
    here = (*place, key if isinstance(key, str) else '*')
    yield Node(value, key, here)
    yield from nodes(value[key], here)


def edited(
  manifest: containers.Json, donors: Donors, rng: random.Random
) -> containers.Json:
  """Returns a manifest after one to three edits."""
  root = [copy.deepcopy(manifest)]
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    if rng.random() < 0.1:
      _reorder_arrays(root[0], rng)
      continue
    node = _any_node(root[0], rng)
    if node is not None:
      rng.choice(_EDITS)(root[0], node, donors, rng)
  return root[0]


def _any_node(manifest: containers.Json, rng: random.Random) -> Node | None:
  """Returns a node; first its place is drawn, then one of the nodes there."""
  places: dict[tuple[str, ...], list[Node]] = {}
  for node in nodes(manifest):
    places.setdefault(node.place, []).append(node)
  return rng.choice(places[rng.choice([*places])]) if places else None


def _reorder_arrays(manifest: containers.Json, rng: random.Random) -> None:
  """Puts the arrays of a leaf into another order, with or without their specs."""
  records = manifest.get('records')
  if not isinstance(records, list) or not records:
    return
  record = rng.choice(records)
  try:
    leaves, specs = record['leaves'], record['spec']['arrays']
    counts = [len(leaf.get('arrays', [''])) for leaf in leaves]
    index = rng.choice([i for i, count in enumerate(counts) if count > 1])
  except (AttributeError, IndexError, KeyError, TypeError):  # of an earlier edit
    return
  start, count = sum(counts[:index]), counts[index]
  order, names = rng.sample(range(count), count), leaves[index]['arrays']
  if isinstance(names, list):
    leaves[index]['arrays'] = [names[i] for i in order]
  if isinstance(specs, list) and len(specs) >= start + count and rng.random() < 0.7:
    specs[start : start + count] = [specs[start + i] for i in order]


Edit = Callable[[containers.Json, Node, Donors, random.Random], None]
"""Changes a node of a manifest."""


def _delete(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Deletes a node."""
  del node.parent[node.key]


def _duplicate(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Repeats an item of a list, or a field by another name."""
  value = copy.deepcopy(node.value)
  if isinstance(node.parent, list):
    node.parent.insert(rng.randrange(len(node.parent) + 1), value)
  else:
    node.parent[f'{node.key}{rng.choice(("_", "x", "/0", "_step", "_corner"))}'] = value


def _rename(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Gives a field the name of another one."""
  if isinstance(node.parent, dict):
    node.parent[rng.choice(donors.keys)] = node.parent.pop(node.key)


def _swap(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Exchanges two nodes of one place, such as the shapes of two leaves."""
  other = rng.choice([x for x in nodes(root) if x.place == node.place])
  value = copy.deepcopy(node.value)
  node.parent[node.key] = copy.deepcopy(other.value)
  other.parent[other.key] = value


def _copy(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Copies the value of another node."""
  other = rng.choice([*nodes(root)])
  node.parent[node.key] = copy.deepcopy(other.value)


def _donate(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Takes the value that the place has in a file of some kind, or adds such a key."""
  if isinstance(node.value, dict) and rng.random() < 0.5:
    below = [x for x in donors.of_place if x[:-1] == node.place and x[-1] != '*']
    if below:
      place = rng.choice(below)
      node.value[place[-1]] = copy.deepcopy(rng.choice(donors.of_place[place]))
    return
  values = donors.of_place.get(node.place)
  if values:
    node.parent[node.key] = copy.deepcopy(rng.choice(values))


def _number(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Changes a number; other nodes become numbers, or change as texts do."""
  old = node.value
  if type(old) is int and rng.random() < 0.6:
    steps = 1, -1, 2, -2, 8, old, -2 * old, -(old // 2)
    node.parent[node.key] = old + rng.choice(steps)
  elif isinstance(old, int | float) or rng.random() < 0.3:
    node.parent[node.key] = rng.choice(_NUMBERS)
  else:
    _text(root, node, donors, rng)


def _text(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Replaces a text; other nodes become texts, or change as lists do."""
  if isinstance(node.value, str) or rng.random() < 0.2:
    node.parent[node.key] = rng.choice((*_STRINGS, *donors.strings))
  else:
    _list(root, node, donors, rng)


def _list(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Empties, cuts, extends, reverses or repeats a list."""
  old = node.value
  if not isinstance(old, list):
    if rng.random() < 0.3:
      node.parent[node.key] = [copy.deepcopy(old)]
    return
  changed = [[], old[:-1], old[1:], [*old, *copy.deepcopy(old[-1:])], old[::-1]]
  changed.append(copy.deepcopy(old) * rng.choice((2, 9, 300)))
  node.parent[node.key] = rng.choice(changed)


def _type(root: Any, node: Node, donors: Donors, rng: random.Random) -> None:
  """Puts a value of any type in the place of a node."""
  node.parent[node.key] = copy.deepcopy(rng.choice(_TYPES))


_EDITS: tuple[Edit, ...] = (
  *(_delete, _duplicate, _rename, _swap, _copy, _donate, _donate),
  *(_number, _number, _text, _list, _type),
)
