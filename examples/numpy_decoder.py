"""A second reader of rotbits files, in NumPy, from docs/format.md alone.

  python examples/numpy_decoder.py FILE OUTPUT.safetensors [BASE.safetensors]

It writes the parameters by their paths, and shares no code with the package. Structured
leaves are read by `numpy_leaves`, from docs/format_leaves.md. It checks checksums only:
give it no files from strangers.
"""

import collections
import io
import json
import math
import sys
import zlib

from ml_dtypes import finfo  # which makes its dtypes known to NumPy
import numpy as np
import numpy_leaves
from safetensors import numpy as safetensors_numpy

DIFFERENCES = 'integers', 'known'


def stream(data):
  """A function that takes the next n elements of some bytes, or all if n is -1."""
  read = io.BytesIO(data).read
  return lambda n, dtype='u1': np.frombuffer(read(n * np.dtype(dtype).itemsize), dtype)


def read_message(take, tables, sizes, frequencies):
  """The symbols of units, and the raw bits of both elements, of these sizes."""
  least = take(2, '<u2') @ [1, 1 << 16]
  low, high, counts = np.int64(take(3 * tables.shape[1], '<u2')).reshape(3, -1)
  x, tops = high << 16 | low, np.cumsum(counts + least)
  words = np.append(take(tops[-1], '<u2'), 0)  # a lane without words looks at the next
  owners = np.array([np.repeat(np.arange(f.size), f) for f in frequencies])
  starts, total = np.cumsum(frequencies, 1) - frequencies, owners.shape[1]
  symbols, raw = np.zeros_like(tables), np.zeros((2, *tables.shape), np.int64)

  def refilled(x):
    nonlocal tops
    tops = tops - (x < 1 << 16)
    return np.where(x < 1 << 16, x << 16 | words[tops], x)

  for i, table in enumerate(tables):
    symbols[i] = symbol = owners[table, x % total]
    slot = x % total - starts[table, symbol]
    x = refilled(frequencies[table, symbol] * (x // total) + slot)
    for k, (first, second) in enumerate(sizes[:, :, i]):
      raw[0, i] |= (x >> second) % (1 << first) << 8 * k
      raw[1, i] |= x % (1 << second) << 8 * k
      x = refilled(x >> first + second)
  return symbols.ravel(), raw.reshape(2, -1).T


def read_planes(take, r, rows, lanes):
  """The r raw bits of both elements of each unit: `[units, 2]`."""
  raw, low = np.zeros((rows * lanes, 2), np.int64), 0
  for b in [8] * (r // 8) + [b for b in (4, 2, 1) if r & b]:
    plane = np.unpackbits(take(math.ceil(rows * b / 4) * lanes), bitorder='little')
    plane = plane.reshape(-1, lanes, max(4 // b, 1), 2, b).swapaxes(1, 2)
    raw |= plane.reshape(-1, 2, b)[: len(raw)] @ (1 << low + np.arange(b))
    low += b
  return raw


def move(known, difference, dtype):
  """The bit patterns of elements that differ from known ones."""
  if dtype.kind == 'i':
    return known + difference
  sign = 1 << 8 * dtype.itemsize - 1
  size = known % sign
  least = size - np.minimum(size, 4 << finfo(dtype).nmant)
  place = (difference + size + sign) % (2 * sign) - sign
  gap = np.where(place < 2 * least - sign, least - sign, 2 * least)
  place = np.where(place < least, place - gap, place)
  return place ^ (place & sign > 0) * (sign - 1) ^ known & sign


def read_block(data, told, frequencies, group, dtype):
  """The bit patterns of the elements of each unit: `[units, 1 or 2]`.

  told: tables; then offsets, or shifts and known elements of differences.
  """
  (kind, r, *_), take, count = group, stream(data), told.shape[1]
  lanes, width = 4 if count <= 1 << 16 else 32, 8 if kind == 'bytes' else 10
  told = np.pad(told, ((0, 0), (0, -count % lanes)), 'edge')
  tables, *others = told.reshape(len(told), -1, lanes)
  lows = range(0, r, 8) if kind in DIFFERENCES else ()
  sizes = [np.clip(others[:2], low, low + 8) - low for low in lows]
  sizes = np.array(sizes, np.int64).reshape(-1, 2, *tables.shape)
  symbols, raw = read_message(take, tables, sizes, frequencies)
  if kind not in DIFFERENCES:
    raw = read_planes(take, r, *tables.shape)
  escape = (1 << width) - 1
  size = width * np.count_nonzero(symbols == escape)
  listed = np.unpackbits(take(math.ceil(size / 8)), count=size).reshape(-1, width)
  symbols[symbols == escape] = listed @ (1 << np.arange(width)[::-1])
  bins = np.stack(np.divmod(symbols, 32), -1)
  if kind == 'bytes':
    bits = symbols[:, None] - 30
  elif kind in DIFFERENCES:
    off = (bins >> 1 ^ -(bins & 1)) << told[1:3].T | raw
    bits = move(told[3:].T, off, dtype)
  elif kind == 'codes':
    bits = (bins + told[1:].T << r | raw) ^ 128
  else:
    m, raised, told = finfo(dtype).nmant, kind == 'raised', told[1:].T
    t = 1 + raised
    bits = bins + (0 if raised else told) << m - t | raw % (1 << r - 1) << m + 1 - t - r
    if raised:  # small elements share a step
      small = np.ldexp(bits % (1 << m) * 1.0, told - 1 + finfo(dtype).minexp - m)
      small = small.astype(dtype).view(f'u{dtype.itemsize}')
      bits = np.where(bits >> m, bits + (told - 1 << m), small)
    bits |= raw >> r - 1 << 8 * dtype.itemsize - 1
  bits = bits.astype(f'u{dtype.itemsize}')
  bits[symbols == 1023] = take(-1, bits.dtype).reshape(-1, bits.shape[1])
  return bits[:count]


def read_group(group, tables, blocks, parts, known):
  """Reads the parts of a group; of those of the type `known`, other bits are known."""
  (kind, r, *_), dtype = group, parts[0].dtype
  take, is_different = stream(zlib.decompress(tables, -15)), kind in DIFFERENCES
  p, levels, step = (14, 4, 2) if kind == 'floats' else (12, 32, 1)
  unit, size = (1, 255) if kind == 'bytes' else (2, 32)
  levels = 256 if is_different or unit == 1 else levels
  base, heads, classes = take(1, '<i2'), take(2 * len(parts)).reshape(-1, 2), []
  for (mode, least), part in zip(heads, parts, strict=True):
    rows, columns = math.prod(part.shape[:-1]), math.prod(part.shape[-1:])
    if part.ndim == 1:
      rows, columns = math.ceil(columns / 128), 128
    shared = 1 if columns % unit else unit
    k = np.full((rows, columns), least)  # of 8 bits, so sums are modulo 256
    k += take(rows)[:, None] if mode & 1 else 0
    k += take(columns // shared).repeat(shared) if mode & 2 else 0
    classes.append(k.ravel()[: part.size : unit])
  k = np.int64(np.concatenate(classes))
  stored = np.cumsum(take(levels)) - 1
  counts = np.int64([1, 256] @ take(-1).reshape(2, -1)).reshape(-1, size)
  if is_different:
    several = [x.ravel().view(f'u{x.itemsize}') for x in known or parts]
    near = np.concatenate([np.pad(x, (0, x.size % 2), 'edge') for x in several])
    near = np.int64(near).reshape(-1, 2).T * (kind == 'known')
    level = np.broadcast_to(k + base, near.shape)
    if dtype.kind != 'i':
      exponents = near % (1 << 8 * dtype.itemsize - 1) >> finfo(dtype).nmant
      level = level - 4 * np.maximum(exponents, 1)
    level = np.clip(level, 0, 255)
    shifts = np.clip(level - 64 >> 2, 0, r)
    first, second = stored[level - 4 * shifts]
    told = np.array([first * len(counts) + second, *shifts, *near], np.int64)
    pairs = counts.repeat(len(counts), 0), np.tile(counts, (len(counts), 1))
  else:
    told = np.stack([k % levels, k // levels * step + base])
    pairs = [counts[stored]] * 2
  frequencies = pairs[0]
  if unit == 2:
    weights = (pairs[0][:, :, None] * pairs[1][:, None]).reshape(len(pairs[0]), -1)
    frequencies = weights[:, :-1] + (1 << 27 - p) >> 28 - p
  escape = (1 << p) - frequencies.sum(1, keepdims=True)
  frequencies = np.append(frequencies, escape, 1)
  length = math.ceil(k.size / len(blocks))
  pieces = zip(blocks, np.split(told, range(length, k.size, length), 1), strict=True)
  bits = np.vstack([read_block(*x, frequencies, group, dtype) for x in pieces])
  ends = np.cumsum([math.ceil(part.size / unit) for part in parts])[:-1]
  for part, numbers in zip(parts, np.split(bits, ends), strict=True):
    part.view(bits.dtype)[...] = numbers.ravel()[: part.size].reshape(part.shape)


def read_record(spec, data, known):
  """The arrays of a record; known(i, arrays) gives bits near the array i."""
  take, members, masked = stream(data), collections.defaultdict(list), []
  arrays = [np.empty(shape, dtype) for dtype, shape, *_ in spec['arrays']]
  for i, (array, entry) in enumerate(zip(arrays, spec['arrays'], strict=True)):
    (*_, groups, m), parts = entry, [array]
    if len(groups) > 1:  # without zeros
      rows, columns = math.prod(array.shape[:-1]), math.prod(array.shape[-1:])
      signs = np.empty(math.ceil((array.size - m) / 8), 'u1')
      mask = np.empty((rows, math.ceil(columns / 8)), 'u1')
      parts = [mask, np.empty(m, array.dtype), signs][: len(groups)]
      masked.append((array, *parts))
    elif array.itemsize == 8 or array.dtype.kind == 'u':
      parts = [array.reshape(-1, 1).view('u1')]
    for group, part in zip(groups, parts, strict=True):
      members[group].append((i, part))
  tables = [take(group[2]) for group in spec['groups']]
  blocks = [[take(n) for n in group[3]] for group in spec['groups']]
  for _, part in members[None]:
    part[...] = take(part.size, part.dtype).reshape(part.shape)
  several = zip(spec['groups'], tables, blocks, range(len(tables)), strict=True)
  for group, *others, i in sorted(several, key=lambda x: x[0][0] == 'known'):
    near = [known(j, arrays) for j, _ in members[i]] if group[0] == 'known' else None
    read_group(group, *others, [part for _, part in members[i]], near)
  for array, mask, values, *signs in masked:
    bits = array.view(f'u{array.itemsize}').reshape(len(mask), -1)
    is_set = np.unpackbits(mask, axis=1, count=bits.shape[1]) > 0
    bits[is_set], bits[~is_set] = values.view(bits.dtype), 0
    if signs:
      negative = np.unpackbits(signs[0], count=np.count_nonzero(~is_set))
      bits[~is_set] = negative.astype(bits.dtype) << 8 * array.itemsize - 1
  for array, (_, _, crc32, *_) in zip(arrays, spec['arrays'], strict=True):
    assert zlib.crc32(array.tobytes()) == crc32, 'an array is damaged'
  return arrays


def main(path, output, base=None):
  base = safetensors_numpy.load_file(base) if base else {}
  streams = safetensors_numpy.load_file(path)  # one per record, and the manifest
  manifest = json.loads(zlib.decompress(streams['manifest']))
  config, tensors, empty = manifest.get('config'), {}, []
  # Records with leaves that need others come last.
  needs = lambda record: any('needs' in leaf for leaf in record['leaves'])
  for record in sorted(manifest['records'], key=needs):
    # Leaves without arrays of their own are last, together.
    is_joined = lambda leaf: 'arrays' in leaf and 'type_name' not in leaf
    leaves = sorted(record['leaves'], key=is_joined)
    owners = [(leaf, name) for leaf in leaves for name in leaf.get('arrays', [''])]

    def known(i, arrays, owners=owners):
      leaf, several = owners[i][0], zip(owners, arrays, strict=False)
      a = {name: x for (owner, name), x in several if owner is leaf}
      bits, differs = numpy_leaves.predicted(leaf, a, tensors, base, config)
      return bits[differs]

    data, joined = streams[record['name']], {}
    arrays = iter(read_record(record['spec'], data, known))
    for leaf in leaves:
      a = {name: next(arrays) for name in leaf.get('arrays', [''])}
      if is_joined(leaf):
        left = joined[leaf['dtype']] if leaf['dtype'] in joined else next(arrays)
        a[''], joined[leaf['dtype']] = np.split(left, [math.prod(leaf['shape'])])
      tensors[leaf['path']] = numpy_leaves.read_leaf(leaf, a, tensors, base, config)
    empty += record.get('empty', [])
  tensors = {k: x.copy() for k, x in tensors.items() if not k.startswith('subspaces.')}
  safetensors_numpy.save_file(tensors, output, {'empty': json.dumps(empty)})


if __name__ == '__main__':
  main(*sys.argv[1:])
