"""Mutations that keep what a checksum or a format would refuse at once."""

from collections.abc import Callable
import contextlib
import copy
import io
import json
import random
import struct
from typing import Any
import zipfile

from fuzz import containers

MutateBytes = Callable[[bytes], bytes]
"""Changes some bytes, by what the fuzzer knows of coverage."""

_SPECIAL: list[Any] = [
  *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 65535, 1 << 20),
  *((1 << 31) - 1, 1 << 31, 1 << 32, 1 << 48, 1 << 53, 1 << 62, 1 << 63, 10**30),
  *(10**400, 0.5, -0.5, 1e308, float('inf'), float('nan')),
  *('', 'x', 'a/b', '../x', '\x1b[2J', '\ud800', 'x' * 300),
  *([], {}, [[]], [0], [1, 2], {'x': 1}, [1 << 40]),
]


def edit_json(value: Any, rng: random.Random) -> Any:
  """Returns a JSON value with one to three changes of its nodes."""
  root = [copy.deepcopy(value)]
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    places, stack = [], [root]
    while stack:
      node = stack.pop()
      for key in list(node) if isinstance(node, dict) else range(len(node)):
        places.append((node, key))
        if isinstance(node[key], dict | list):
          stack.append(node[key])
    if places:
      parent, key = rng.choice(places)
      other, place = rng.choice(places)
      _edit(parent, key, other[place], rng)
  return root[0] if root else None


def _edit(parent: Any, key: Any, other: Any, rng: random.Random) -> None:
  """Changes a node of a JSON value; `other` is another node."""
  old = parent[key]
  match rng.randrange(8):
    case 0 | 1 if type(old) is int:
      parent[key] = old + rng.choice((1, -1, 2, -2, 8, old, -2 * old, -(old // 2)))
    case 2 if type(old) is int:
      parent[key] = old ^ 1 << rng.randrange(40)
    case 3:
      parent[key] = copy.deepcopy(other)
    case 4:
      del parent[key]
    case 5 if isinstance(parent, list):
      parent.insert(key, copy.deepcopy(old))
    case 5:
      parent[f'{key}{rng.choice("_x/0")}'] = copy.deepcopy(old)
    case 6 if rng.random() < 0.1:
      for _ in range(rng.choice((10, 200, 3000))):
        old = [old]
      parent[key] = old
    case _:
      parent[key] = copy.deepcopy(rng.choice(_SPECIAL))


def _json_text(value: Any, rng: random.Random) -> bytes:
  """Returns the text of a JSON value, sometimes with text that `json` never writes."""
  text = containers.to_json(value)
  if rng.random() < 0.3:
    text = text.replace(b'Infinity', b'1e999')
  return text.replace(b'{', b'{"x":1,"x":2,', 1) if rng.random() < 0.02 else text


def mutate_json(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a JSON text with changed nodes or changed bytes."""
  with contextlib.suppress(ValueError, RecursionError):
    if rng.random() < 0.8:
      return _json_text(edit_json(json.loads(data), rng), rng)
  return mutate(data)


def mutate_container(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a container with a changed manifest or stream and correct checksums."""
  with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
    streams, manifest = containers.unpack(data)
    if rng.random() < 0.4 and streams:
      name = rng.choice(list(streams))
      changed = mutate(streams[name])
      if rng.random() < 0.7:  # the length is in the manifest
        size = len(streams[name])
        changed = changed[:size] + streams[name][len(changed) :]
      streams[name] = changed
    else:
      manifest = edit_json(manifest, rng)
    if isinstance(manifest, dict) and rng.random() < 0.95:
      manifest = containers.sealed(streams, manifest)
    return containers.pack(streams, _json_text(manifest, rng))
  return mutate(data)


def mutate_zip(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a zip with a changed member and its correct checksum."""
  members: dict[str, bytes] = {}
  # Damaged members cause errors of zlib and LZMA, too.
  with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
    members = {x.filename: archive.read(x) for x in archive.infolist()[:20]}
  if not members or rng.random() < 0.1:
    return mutate(data)
  name, file = rng.choice(list(members)), io.BytesIO()
  members[name] = mutate(members[name])
  with zipfile.ZipFile(file, 'w') as archive:
    for name, content in members.items():
      archive.writestr(zipfile.ZipInfo(name), content)
  return file.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a safetensors file with a changed header and its correct length."""
  if rng.random() < 0.1 or len(data) < 8:
    return mutate(data)
  (size,) = struct.unpack('<Q', data[:8])
  changed = mutate_json(data[8 : 8 + size], rng, mutate)
  return struct.pack('<Q', len(changed)) + changed + data[8 + size :]
