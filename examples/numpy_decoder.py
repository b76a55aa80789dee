"""A second reader of rotbits files, in NumPy, from docs/format*.md alone.

  python examples/numpy_decoder.py FILE OUTPUT.safetensors [BASE.safetensors]

It writes the parameters by their paths, and shares no code with the package. It checks
checksums only: give it no files from strangers.
"""

import functools
import io
import json
import math
import pathlib
import sys
import zlib

from ml_dtypes import finfo  # which makes its dtypes known to NumPy
import numpy as np
from safetensors import numpy as safetensors_numpy

np.seterr(over='ignore', invalid='ignore')  # of numbers that are not final yet


def ceil_div(a, b):
  return -(-a // b)


def bits_of(numbers, sign='u'):
  """The bit patterns of numbers as integers, unsigned or signed."""
  return numbers.view(f'{sign}{numbers.itemsize}')


def is_float(dtype):
  return 'float' in str(dtype)


# ---- tables ----------------------------------------------------------------------


def inflate(data):
  unpacker = zlib.decompressobj(-15)
  return np.frombuffer(unpacker.decompress(data), np.uint8), unpacker.unused_data


def stored_tables(data, count, size):
  """Frequencies `[count, size]`."""
  low, high = np.frombuffer(zlib.decompress(data), np.uint8).reshape(2, -1)
  values = iter((low + 256 * np.int64(high)).tolist())
  frequencies = np.zeros((count, size), np.int64)
  for table in frequencies:
    first, last = next(values), next(values) + 1
    table[first:last] = [next(values) for _ in range(first, last)]
  return frequencies


def pair_tables(counts, precision):
  """The frequencies of pairs of bins, `[K, 1024]`."""
  weights = (counts[:, :, None] * counts[:, None]).reshape(len(counts), -1)
  scaled = lambda x: x + (1 << 27 - precision) >> 28 - precision
  frequencies = scaled(weights)
  frequencies[:, -1] = 0
  rare = np.sum(weights * (frequencies == 0), 1)
  large = frequencies >= 8
  frequencies[:, -1] = np.maximum(scaled(rare), 1)
  left = (1 << precision) - np.sum(frequencies * ~large, 1, keepdims=True)
  ends = np.cumsum(weights * large, 1)
  whole = np.maximum(ends[:, -1:], 1)
  shared = np.diff((ends * left + whole // 2) // whole, prepend=0)
  return np.where(large, shared, frequencies)


def read_contexts(data, shapes, kind, raised, top, known=None):
  """The table of each unit, what its class tells, and frequencies `[K, A]`."""
  part, data = inflate(data)
  take, size = io.BytesIO(part).read, 2 if kind == 'floats' else 1
  count, number, start = np.frombuffer(take(6), '<i2').tolist()
  entries = np.frombuffer(take(2 * number), np.uint8).reshape(2, -1)
  entries = np.cumsum(entries, 1, np.uint8).astype(np.int64)
  shapes = shapes if known is None else []
  heads = np.frombuffer(take(2 * len(shapes)), np.uint8).reshape(-1, 2).tolist()
  classes = [] if known is None else [known]
  for (mode, base), shape in zip(heads, shapes, strict=True):
    rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
    each = 1 if columns % size else size  # columns that share a scale
    read = lambda n, has: (
      np.int64(np.frombuffer(take(n), 'u1')) if has else np.int64([0])
    )
    row, column = read(rows, mode & 1), read(columns // each, mode & 2)
    place = np.zeros((rows, columns), np.int64) + row[:, None]
    place = (place + column.repeat(each if mode & 2 else 1)).ravel()[::size]
    classes.append(base + place)
  classes = np.concatenate(classes)
  stored = stored_tables(data, count, 32 if size == 2 else 256)
  if size == 2:
    stored = pair_tables(stored, 12 if raised else 14)
  if not number:
    return classes & 3, (classes >> 2 << top) + start, stored
  return *entries[:, classes], stored


# ---- blocks ----------------------------------------------------------------------


class Message:
  """The lanes of a block."""

  def __init__(self, data, lanes):
    words = np.frombuffer(data[: len(data) & ~1], '<u2')
    x = words[3 : 3 + 2 * lanes].astype(np.uint32).reshape(2, lanes)
    self.x, width, start = x[0] | x[1] << 16, int(words[2]), 3 + 2 * lanes
    least, stop = int(words[0]) | int(words[1]) << 16, start + lanes * width // 2
    sizes = words[start:stop].view(f'<u{width}') + np.int64(least)
    self.place, self.words = np.cumsum(sizes), np.append(words[stop:], 0)
    self.end = 2 * int(stop + sizes.sum())  # the first byte behind the message

  def pop(self, precision, lookup):
    slot = np.int64(self.x & (1 << precision) - 1)
    symbol, start, frequency = lookup(slot)
    x = np.uint32(frequency) * (self.x >> precision) + np.uint32(slot - start)
    self.place -= x < 1 << 16
    self.x = np.where(x < 1 << 16, x << 16 | self.words[self.place], x)
    return symbol


def read_block(data, count, tables, told, frequencies, layout):
  """The bits of the numbers of a block."""
  kind, dtype, r, raised, top = layout
  precision, lanes = 12 if raised else 14, 4 if count <= 1 << 16 else 32
  fill = lambda x: np.append(x, np.repeat(x[-1:], -x.size % lanes)).reshape(-1, lanes)
  owners = np.array([np.repeat(np.arange(f.size), f) for f in frequencies])
  starts, message = np.cumsum(frequencies, 1) - frequencies, Message(data, lanes)
  tables, told = fill(tables), fill(told)
  symbols = np.empty(tables.shape, np.int64)
  for t, table in enumerate(tables):

    def lookup(slot, table=table):
      symbol = owners[table, slot]
      return symbol, starts[table, symbol], frequencies[table, symbol]

    symbols[t] = message.pop(precision, lookup)
    s = told[t] if kind != 'floats' else np.int64([0])
    while s.any():
      size = np.minimum(s, 16)
      shift = lambda slot, rest=16 - size: (
        slot >> rest,
        slot >> rest << rest,
        1 << rest,
      )
      symbols[t] = symbols[t] << size | message.pop(16, shift)
      s = s - size
  data = np.frombuffer(data, np.uint8)[message.end :]
  told = told.reshape(-1)
  if kind == 'floats':
    bits, data = read_floats(data, symbols, told, dtype, r, raised, top)
  else:
    bits = symbols.reshape(-1, 1) - (128 << told[:, None] if dtype.kind == 'i' else 0)
  bits = bits[:count].astype(f'u{dtype.itemsize}')
  number = data.size // (3 + bits[0].nbytes)
  places = np.pad(data[: 3 * number].reshape(-1, 3), ((0, 0), (0, 1))).copy()
  exact = data[3 * number :].view(bits.dtype)
  bits[places.view('<u4')[:, 0]] = exact.reshape(number, bits.shape[1])
  return bits


def read_floats(data, symbols, told, dtype, r, raised, top):
  """The bits of pairs, and the bytes behind the list of bins."""
  (rows, lanes), raw, low = symbols.shape, np.zeros((symbols.size, 2), np.int64), 0
  for width in [8] * (r // 8) + [x for x in (4, 2, 1) if r & x]:
    size = ceil_div(rows * width, 4) * lanes
    plane = data[:size].view('<u2') if width == 8 else data[:size]
    data = data[plane.nbytes :]
    shared = max(4 // width, 1)
    plane = plane.reshape(-1, 1, lanes) >> 2 * width * np.arange(shared)[:, None]
    pair = plane.reshape(-1, lanes)[:rows].reshape(-1)
    raw[:, 0] |= (pair & (1 << width) - 1) << low
    raw[:, 1] |= (pair >> width & (1 << width) - 1) << low
    low += width
  symbols = symbols.reshape(-1)
  listed = symbols == 1023
  size = ceil_div(10 * listed.sum(), 8)
  pairs = np.unpackbits(data[:size], count=10 * listed.sum()).reshape(-1, 10)
  symbols[listed] = pairs @ (1 << np.arange(9, -1, -1))
  bins = np.stack([symbols >> 5, symbols & 31], -1)
  m, width = finfo(dtype).nmant, 8 * dtype.itemsize
  sign = raw >> r - 1 << width - 1
  large = (raw & (1 << r - 1) - 1) << m - top + 1 - r
  f = told[:, None] if raised else 1
  large |= bins + (0 if raised else told[:, None]) << m - top
  if raised:  # the value in steps, or above them
    exponent = f + 1 - m - (1 << finfo(dtype).nexp - 1)
    small = np.ldexp(np.where(large >> m, 0.0, large), exponent).astype(dtype)
    large = np.where(large >> m, large + (f - 1 << m), np.int64(bits_of(small)))
  return sign | large, data[size:]


def read_blocks(blocks, layout, sizes, contexts):
  """The bits of the numbers of a group, whose parts have so many."""
  tables, told, frequencies = contexts
  each = ceil_div(tables.size, ceil_div(tables.size, 1 << 19))
  bits = np.concatenate(
    [
      read_block(block, run.size, run, more, frequencies, layout)
      for block, run, more in zip(
        blocks,
        np.split(tables, range(each, tables.size, each)),
        np.split(told, range(each, tables.size, each)),
        strict=True,
      )
    ]
  )
  size = bits.shape[1]
  ends = np.cumsum([ceil_div(n, size) for n in sizes])
  return [x.ravel()[:n] for x, n in zip(np.split(bits, ends[:-1]), sizes, strict=True)]


# ---- arrays ----------------------------------------------------------------------


def parts_of(dtype, shape, crc32, groups, zeros):
  """The dtypes and shapes of the parts of an array."""
  if zeros is None:
    wide = np.dtype(dtype).itemsize == 8
    return [('uint32', [*shape, 2]) if wide else (dtype, shape)]
  values, negative, transposed = zeros
  matrix = math.prod(shape[:-1]), math.prod(shape[-1:])
  lines, length = matrix[::-1] if transposed else matrix
  signs = ceil_div(lines * length - values, 8) if negative else 0
  masks = [('uint8', [lines, ceil_div(length, 8)]), ('uint8', [signs])]
  return [*masks, (dtype, [values // 128, 128]), (dtype, [values % 128])]


def joined(parts, shape, zeros):
  """The bits of an array."""
  if zeros is None:
    return parts[0]
  mask, signs, *rows = parts
  bits = np.zeros((math.prod(shape[:-1]), math.prod(shape[-1:])), rows[0].dtype)
  ordered = bits.T if zeros[2] else bits
  is_set = np.unpackbits(mask, axis=1, count=ordered.shape[1]) > 0
  ordered[is_set] = np.concatenate([x.reshape(-1) for x in rows])
  if zeros[1]:
    negative = np.unpackbits(signs, count=np.count_nonzero(~is_set))
    ordered[~is_set] = negative.astype(bits.dtype) << 8 * bits.itemsize - 1
  return bits


def checked(bits, array):
  """The array of these bits."""
  dtype, shape, crc32, *_ = array
  size = np.dtype(dtype).itemsize
  data = (bits if size == 8 else bits.astype(f'u{size}')).tobytes()
  if zlib.crc32(data) != crc32:
    raise ValueError('an array is damaged')
  return np.frombuffer(bytearray(data), dtype).reshape(shape)


def read_record(spec, stream):
  """The arrays of a record; functions for those of known classes."""
  take, arrays = io.BytesIO(stream).read, spec['arrays']
  heads = [take(group[4]) for group in spec['groups']]
  bodies = [[take(n) for n in group[5]] for group in spec['groups']]
  parts = [
    (np.dtype(dtype), shape, array[3][j], (i, j))
    for i, array in enumerate(arrays)
    for j, (dtype, shape) in enumerate(parts_of(*array))
  ]
  content, known = {}, {}
  for g, (kind, r, raised, top, *_) in enumerate(spec['groups']):
    members = [part for part in parts if part[2] == g]
    sizes = [math.prod(x[1]) for x in members]
    layout = kind, members[0][0], r, raised, top
    decoded = functools.partial(read_blocks, bodies[g], layout, sizes)
    contexts = heads[g], [x[1] for x in members], kind, raised, top
    if kind == 'known':
      i, _ = members[0][3]
      known[i] = lambda classes, decoded=decoded, contexts=contexts, i=i: checked(
        decoded(read_contexts(*contexts, classes))[0], arrays[i]
      )
      continue
    of_parts = decoded(read_contexts(*contexts))
    for (dtype, shape, _, key), part in zip(members, of_parts, strict=True):
      content[key] = part.astype(f'u{dtype.itemsize}').reshape(shape)
  for dtype, shape, group, key in parts:
    if group is None:
      data = take(math.prod(shape) * dtype.itemsize)
      content[key] = np.frombuffer(data, f'u{dtype.itemsize}').reshape(shape)
  for i, array in enumerate(arrays):
    if i in known:
      yield known[i]
    else:
      bits = joined([content[i, j] for j in range(len(array[3]))], array[1], array[4])
      yield checked(bits, array)


# ---- differences -----------------------------------------------------------------


def moved(known, difference, dtype):
  """The bits of elements that differ from known ones."""
  if not is_float(dtype):
    return known + difference
  top = np.iinfo(known.dtype).max
  flip = lambda x: x ^ (x >> 8 * x.itemsize - 1 & top)
  sign = known & ~top
  return flip((known ^ sign) + difference) ^ sign


def embedding_bits(s, a):
  """The bits of an embedding that is predicted from the head."""
  h = np.rint(np.ldexp(np.float64(s['head']), a['shifts'][:, None]))
  p = np.ldexp(h.T @ np.float64(a['map']), -s.get('scale', 0))
  return bits_of(np.float32(p).astype(s['name']), 'i')


def known_bits(s, a):
  """The bits of the known array, cut or filled with zeros."""
  if 'map' in a:
    return embedding_bits(s, a).ravel()
  n = math.prod(s['lengths'])
  bits = bits_of(np.ravel(s['known'].astype(s['name'], order='C'))[:n], 'i')
  return np.pad(bits, (0, n - bits.size))


def predicted(b, s, a):
  """The bits of elements before the differences."""
  name = s['name']
  if 'left' in a:
    wide = np.float64(b.view(name))
    product = np.float64(a['left']) @ a['right']
    near = np.float32(wide + np.ldexp(product, s.get('unit', 0))).astype(name)
    b = np.where(np.isfinite(wide), bits_of(near, 'i'), b)
  if 'drift' in a:
    m, top = finfo(name).nmant, b & np.iinfo(b.dtype).max
    drift = a['drift'][top >> max(m - 8, 0) & min((1 << m) - 1, 255)]
    b = b + drift.astype(b.dtype) * ((top >> m) % ((1 << finfo(name).nexp) - 1) > 0)
  return b


def difference(s, a):
  name, bits = s['name'], known_bits(s, a)
  if 'gaps' in a:
    is_last = a['gaps'] < 65535
    at = np.cumsum(np.int64(a['gaps']) + is_last)[is_last] - 1
    bits[at] = moved(bits[at], a['differences'].astype(bits.dtype), name)
  if 'column_scales' in a:
    b = predicted(bits.reshape(-1, s['width']), s, a)
    e = np.zeros(b.shape, np.int64)
    if is_float(name):
      m = finfo(name).nmant
      e = 8 * np.maximum(np.int64((b & np.iinfo(b.dtype).max) >> m), 1)
    level = (np.int64(a['row_scales'])[:, None] + a['column_scales'] - e) >> 1
    classes = np.clip(level + 24, 0, 255).ravel()
    bits = moved(b.ravel(), a['differences'](classes), name)
  return bits.view(s['name']).reshape(s['lengths'])


# ---- products --------------------------------------------------------------------


def subspace(s, a):
  t, (m, d) = np.float64(a['numbers']) * s['step'], a['numbers'].shape
  if 'mask' not in a:
    return np.int32(t)
  one = lambda n: 2.0**25 * np.eye(n)
  scaled = lambda x: np.rint(x * 2.0**-25)
  g, z = scaled(t @ t.T) + one(m), np.rint(one(m) * (2 / 3))
  for _ in range(5):
    z = scaled(z @ (2 * one(m) - scaled(g @ z)))
  low = 2 * scaled(z @ t)
  top = np.unpackbits(a['mask'], count=m + d, bitorder='little') > 0
  basis = np.empty((m + d, d), np.int32)
  basis[top], basis[~top] = one(d) - scaled(t.T @ low), low
  return basis


def product(p, arrays, bases, name, hidden):
  """A product with tensors of the dense model."""
  narrow = lambda x: np.float32(x).astype(name)
  rounded = lambda x: np.float64(narrow(x) if p.get('rounded') else x)
  power = lambda x, k: k - np.frexp(abs(x).max(-1, keepdims=True))[1]
  k = 26 - (hidden.bit_length() + 1) // 2
  if p['kind'] == 'shortcut':
    v, w = (2.0**25 * np.eye(hidden) if x is None else x for x in bases)
    return narrow(np.ldexp(v.T @ w, -50))
  whole = np.float64(arrays[0])
  across = p['kind'] != 'writes' and not p.get('transposed')
  x, e = rounded(whole.T if across else whole), 25
  if p['kind'] == 'bias':
    n = power(o := rounded(arrays[1]), k)
    bases, e = [np.rint(np.ldexp(o, n))], n
  elif p['kind'] == 'reads':
    x = rounded(x * rounded(arrays[1]))
  elif p.get('centred'):
    i = np.rint(np.ldexp(x, n := power(x, 52 - (hidden - 1).bit_length())))
    x = rounded(np.ldexp(i - i.sum(-1, keepdims=True) / hidden, -n))
  if bases[0] is not None:
    y = np.rint(np.ldexp(x, n := power(x, k))) @ bases[0]
    x = np.ldexp(y, -(n[:, 0] if p['kind'] == 'bias' else n) - e)
  x = x + rounded(arrays[2]) if len(arrays) > 2 else x
  return narrow(x.T if p['kind'] == 'reads' else x)


# ---- leaves ----------------------------------------------------------------------


def gram_basis(b):
  return np.concatenate([np.eye(b.shape[1]) - b.T @ b / 4, b])


def identity_minus_gram(s, a):
  square = np.eye(len(a['b'])) - a['b'] @ a['b'].T + a['c'] @ a['c'].T
  return np.pad(square, ((0, 0), (0, s['columns'] - len(square))))


def line_factors(a, *names):
  exponents = [np.int32(a.get(f'{x}_exponents', [0])) for x in names]
  rows, columns = (np.ldexp(np.float32(4 + e % 4), e // 4 - 2) for e in exponents)
  return rows[:, None] * columns


def low_rank(s, a):
  u, v = a['u'], a['v']
  u = gram_basis(u) if s.get('shortened') == 'u' else u
  return u @ (gram_basis(v.T).T if s.get('shortened') == 'v' else v)


def head_bases(s, a):
  if group := s.get('group'):
    bases = [gram_basis(b.T).T for b in np.split(a['below'], s['heads'])]
    return np.vstack([head for b in bases for head in np.split(b, group, 1)])
  heads = np.split(a['below'], s['heads'], 1)
  rotary = np.split(a.get('rotary', np.zeros((0, s['heads']))), s['heads'], 1)
  pairs = zip(rotary, map(gram_basis, heads), strict=True)
  return np.hstack([x for pair in pairs for x in pair if x.size])


LEAVES = {
  'difference': difference,
  'basis': subspace,
  'constant': lambda s, a: np.full(s['tail'], a['value']),
  'low_rank': low_rank,
  'identity_minus_gram': identity_minus_gram,
  'trapezoidal_rows': lambda s, a: np.vstack([*a.get('full', []), *a['lower'].T]),
  'head_bases': head_bases,
  'tied': lambda s, a: np.float32(s['head']).T @ a['map'],
  'uniformly_quantized': lambda s, a: (
    a['integers'] * a['step'] * line_factors(a, 'row', 'column')
  ),
}
"""The arrays of leaves with the settings s and the arrays a."""


def expand(kind, s, a):
  """The array that a leaf stands for."""
  wide = lambda x: np.float32(x) if str(x.dtype) in ('float16', 'bfloat16') else x
  if kind != 'difference':
    a = {name: wide(x) for name, x in a.items()}
  for name in [x for x in a if f'{x}_step' in a]:  # multiples of a step
    a[name] = a[name] * a.pop(f'{name}_step')
  for name in [x for x in a if f'{x}_corner' in a]:  # lower triangles
    corner, below = a.pop(f'{name}_corner'), a[name]
    n, columns = (math.isqrt(8 * corner.size + 1) - 1) // 2, below.shape[1]
    (top := np.tril(np.ones((n, columns))))[top > 0] = corner
    a[name] = np.vstack([top, below])
  array = LEAVES[kind](s, a)
  return (array.T if s.get('columns_first') else array).astype(s['dtype'])


# ---- files -----------------------------------------------------------------------


def known_array(leaf, s, base, tensors, config):
  """The array of a base, or the product, beside which a leaf is stored."""
  p = leaf.get('product')
  needed = p.get('arrays', []) if p else [leaf['base']]
  transposed = s.get('columns_first')
  for path, *_, crc32 in needed:
    array = base[path].T if transposed else base[path]
    if zlib.crc32(array.tobytes()) != crc32:
      raise ValueError(f'{leaf["path"]} needs another base')
  if not p:
    return array
  bases = [tensors.get(f'subspaces.{i}/basis') for i in p.get('segments', [])]
  bases = [x if x is None else np.float64(x) for x in bases]
  arrays = [np.float64(base[path]) for path, *_ in needed]
  return product(p, arrays, bases, s['dtype'], config['hidden_size'])


def read_leaf(leaf, arrays, base, tensors, config):
  """The array of a leaf."""
  if 'type_name' not in leaf:
    shift = {'int2': 6, 'int4': 4}.get(leaf['dtype'], 0)
    return arrays[''] << shift >> shift if shift else arrays['']
  s = dict(leaf.get('settings', {}), dtype=leaf['dtype'])
  s['head'] = tensors.get('head/kernel')
  if 'base' in leaf or 'product' in leaf:
    s['known'] = known_array(leaf, s, base, tensors, config)
  array = expand(leaf['type_name'], s, arrays).reshape(leaf['shape'])
  stored = array.T if s.get('columns_first') else array
  if leaf.get('crc32') not in (None, zlib.crc32(stored.tobytes())):
    raise ValueError(f'{leaf["path"]} is damaged')
  return array


def main(path, output, base=None):
  base = safetensors_numpy.load_file(base) if base else {}
  data = pathlib.Path(path).read_bytes()
  tensors, empty = {}, []
  start = 8 + int.from_bytes(data[:8], 'little')
  streams, data = json.loads(data[8:start]), data[start:]
  if streams.pop('__metadata__').get('version') != '1':
    raise ValueError('not a rotbits file of version 1')
  streams = {name: data[slice(*x['data_offsets'])] for name, x in streams.items()}
  manifest = json.loads(zlib.decompress(streams['manifest']))
  # Records with leaves that need others come last.
  needs = lambda record: any('needs' in leaf for leaf in record['leaves'])
  for record in sorted(manifest['records'], key=needs):
    arrays = read_record(record['spec'], streams[record['name']])
    empty += record.get('empty', [])
    for leaf in record['leaves']:
      named = {name: next(arrays) for name in leaf.get('arrays', [''])}
      config = manifest.get('config')
      tensors[leaf['path']] = read_leaf(leaf, named, base, tensors, config)
  tensors = {
    path: x.copy() for path, x in tensors.items() if not path.startswith('subspaces.')
  }
  metadata = {'empty': json.dumps(empty)}
  safetensors_numpy.save_file(tensors, output, metadata=metadata)


if __name__ == '__main__':
  main(*sys.argv[1:])
