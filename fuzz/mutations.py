"""Mutations that keep what a checksum or a format would refuse at once."""

from collections.abc import Callable
import copy
import io
import json
import random
import struct
from typing import Any
import zipfile

from fuzz import containers
from fuzz import gguf_parts

MutateBytes = Callable[[bytes], bytes]
"""Changes some bytes, by what the fuzzer knows of coverage."""

_SPECIAL: list[Any] = [
  *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 65535, 1 << 20),
  *((1 << 31) - 1, 1 << 31, 1 << 32, 1 << 48, 1 << 53, 1 << 62, 1 << 63, 10**30),
  *(10**400, 0.5, -0.5, 1e308, float('inf'), float('nan')),
  *('', 'x', 'a/b', '../x', '\x1b[2J', '\ud800', 'x' * 300),
  *([], {}, [[]], [0], [1, 2], {'x': 1}),
  [1 << 40],
]


def edit_json(value: Any, rng: random.Random) -> Any:
  """Returns a JSON value with one to three changes of its nodes."""
  root = [copy.deepcopy(value)]
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    places = list(_places(root))
    if not places:
      return None
    parent, key = rng.choice(places)
    _edit(parent, key, places, rng)
  return root[0] if root else None


def _places(node: Any) -> Any:
  """Yields each node of a JSON value as its parent and its key there."""
  stack = [node]
  while stack:
    parent = stack.pop()
    keys = parent if isinstance(parent, dict) else range(len(parent))
    for key in keys:
      yield parent, key
      if isinstance(parent[key], (dict, list)):
        stack.append(parent[key])


def _edit(
  parent: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random
) -> None:
  old = parent[key]
  match rng.randrange(10):
    case 0 | 1:
      parent[key] = copy.deepcopy(rng.choice(_SPECIAL))
    case 2 | 3 if type(old) is int:
      change = rng.choice((1, -1, 2, -2, 8, old, -2 * old, -old, old // 2))
      parent[key] = old + change
    case 4 if type(old) is int:
      parent[key] = old ^ 1 << rng.randrange(40)
    case 5:
      other, place = rng.choice(places)
      if isinstance(other, list) and place >= len(other):
        return
      if not isinstance(other, list) and place not in other:
        return
      parent[key] = copy.deepcopy(other[place])
    case 6 if len(places) > 1:
      del parent[key]
    case 7 if isinstance(parent, list):
      parent.insert(key, copy.deepcopy(old))
    case 7:
      parent[f'{key}{rng.choice("_x/0")}'] = copy.deepcopy(old)
    case 8 if isinstance(old, list):
      rng.shuffle(old)
    case 9 if rng.random() < 0.1:
      for _ in range(rng.choice((10, 200, 3000))):
        old = [old]
      parent[key] = old
    case _:
      parent[key] = copy.deepcopy(rng.choice(_SPECIAL))


def json_text(value: Any, rng: random.Random) -> bytes:
  """Returns the text of a JSON value, sometimes with text that `json` never writes."""
  try:
    text = containers.to_json(value)
  except (RecursionError, ValueError):
    return b'[' * 3000
  if rng.random() < 0.3:
    text = text.replace(b'Infinity', b'1e999')
  if rng.random() < 0.02:
    text = text.replace(b'{', b'{"x":1,"x":2,', 1)
  return text


def mutate_json(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a JSON text with changed nodes or changed bytes."""
  if rng.random() < 0.2:
    return mutate(data)
  try:
    return json_text(edit_json(json.loads(data), rng), rng)
  except (ValueError, RecursionError):
    return mutate(data)


def mutate_container(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a container with a changed manifest or stream and correct checksums."""
  try:
    streams, manifest = containers.unpack(data)
    names = list(streams)
    kind = rng.random()
    if kind < 0.02:
      return mutate(data)
    if kind < 0.35 and names:
      name = rng.choice(names)
      changed = mutate(streams[name])
      if rng.random() < 0.7:  # the length is in the manifest
        size = len(streams[name])
        changed = changed[:size] + streams[name][len(changed) :]
      streams[name] = changed
    elif kind < 0.4 and len(names) > 1:
      a, b = rng.sample(names, 2)
      streams[a], streams[b] = streams[b], streams[a]
    else:
      manifest = edit_json(manifest, rng)
    if isinstance(manifest, dict) and rng.random() < 0.95:
      manifest = containers.sealed(streams, manifest)
    return containers.pack(streams, json_text(manifest, rng))
  except (ValueError, RecursionError, KeyError, TypeError):
    return mutate(data)


def mutate_zip(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a zip with a changed member and its correct checksum."""
  if rng.random() < 0.1:
    return mutate(data)
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      members = {x.filename: archive.read(x) for x in archive.infolist()[:20]}
  except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, RuntimeError):
    return mutate(data)
  except Exception:  # zlib's and LZMA's own errors, of members that were damaged
    return mutate(data)
  if not members:
    return mutate(data)
  programs = [name for name in members if name.endswith('.pkl')]
  name = rng.choice(programs if programs and rng.random() < 0.8 else list(members))
  match rng.randrange(8):
    case 0:
      members[f'{name}{rng.choice(("", "x", "/data.pkl"))}'] = members.pop(name)
    case 1:
      del members[name]
    case _:
      members[name] = mutate(members[name])
  methods = zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA
  method = rng.choice(methods) if rng.random() < 0.05 else zipfile.ZIP_STORED
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', method) as archive:
    for name, content in members.items():
      archive.writestr(zipfile.ZipInfo(name), content, method)
  return file.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a safetensors file with a changed header and its correct length."""
  if rng.random() < 0.1 or len(data) < 8:
    return mutate(data)
  (size,) = struct.unpack('<Q', data[:8])
  header, body = data[8 : 8 + size], data[8 + size :]
  changed = mutate_json(header, rng, mutate)
  return struct.pack('<Q', len(changed)) + changed + body


def mutate_gguf(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Returns a GGUF file with changed bytes, or with other values of its fields."""
  if rng.random() < 0.5:
    return mutate_bytes(data, rng, mutate)
  try:
    parts = gguf_parts.unpack(data)
    fields = dict(parts.fields)
    name = rng.choice(list(fields))
  except (ValueError, IndexError):
    return mutate(data)
  match rng.randrange(8):
    case 0:
      del fields[name]
    case 1:
      fields[name + rng.choice((b'_', b'.x'))] = fields[name]
    case 2:
      fields[name] = fields[rng.choice(list(fields))]
    case 3:
      fields[name] = mutate(fields[name])
    case _:
      fields[name] = _gguf_value(rng)
  return gguf_parts.pack(parts._replace(fields=fields))


def _gguf_value(rng: random.Random) -> bytes:
  """Returns kind and value of a field: a number, a string, or a list of either."""
  texts = [b'', b'a', b'a b', b'llama', b'\xff', b'x' * 300]
  match rng.randrange(4):
    case 0:
      return gguf_parts.string(rng.choice(texts))
    case 1:
      return gguf_parts.strings(rng.choices(texts, k=rng.choice((0, 1, 16))))
  kind = rng.choice(list(gguf_parts.SIZES))
  size = gguf_parts.SIZES[kind] * rng.choice((1, 1, 1, 0, 16))
  packed = rng.choice((bytes(size), rng.randbytes(size), b'\xff' * size))
  if size == gguf_parts.SIZES[kind] and rng.random() < 0.7:
    return gguf_parts.number(kind, packed)
  return gguf_parts.numbers(kind, packed)


def mutate_bytes(data: bytes, rng: random.Random, mutate: MutateBytes) -> bytes:
  """Changes bytes; sometimes writes a special number of 4 or 8 bytes."""
  if rng.random() < 0.5 or len(data) < 16:
    return mutate(data)
  number = rng.choice((0, 1, 2, 8, 9, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 40, 255))
  packed = struct.pack('<Q', number)[: rng.choice((4, 8))]
  place = rng.randrange(len(data) - 8)
  return data[:place] + packed + data[place + len(packed) :]
