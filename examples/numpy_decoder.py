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

TOTAL = 1 << 14
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


def normal_table(k, present, kind, dtype, r, f):
  """The frequencies of class k, `[A]`."""
  symbol = np.arange(present.size)
  if kind == 'float':
    e, m = symbol >> 3, symbol % 8
    w = np.maximum(e, 1) - (1 << finfo(dtype).nexp - 1) - 3 + f
    x, c = w - 1, 2 * (m + 8 * (e > 0)) + 1
  else:
    w, x, c = (0, r - 2, 2 * symbol + 1) if r else (0, 0, (symbol + 1) // 2)
  q, s = 8 * x - k, (8 * x - k >> 2) - 12
  square = c**2 * np.array([756388, 899502, 1069694, 1272087])[q % 4]
  bits = 256 * w - (square << np.clip(s, 0, 12) >> np.clip(-s, 0, 62))
  below = bits.max() - bits
  powers = np.floor(2.0 ** (30 - below % 256 / 256)).astype(np.int64)
  weights = np.maximum(1, powers >> np.minimum(below >> 8, 62)) * present
  least = weights.sum() // max(TOTAL - present.sum(), 1) + 1
  ends = np.cumsum(np.maximum(weights, least) * present)
  return np.diff((ends * TOTAL + ends[-1] // 2) // ends[-1], prepend=0)


def read_tables(data, shapes, layout):
  """The table of each element, and frequencies `[K, A]`."""
  part, data = inflate(data)
  take, lines = io.BytesIO(part).read, []
  size = int.from_bytes(take(2), 'little')
  heads = np.frombuffer(take(4 * len(shapes)), '<i2').reshape(-1, 2).tolist()
  for (mode, _), shape in zip(heads, shapes, strict=True):
    rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
    read = lambda n, has: np.int64(np.frombuffer(take(n if has else 0), 'u1'))
    row, column = read(rows, mode in (2, 4)), read(columns, mode in (3, 4))
    place = np.zeros((rows, columns), np.int64)
    place += row[:, None] if row.size else 0
    place += column if column.size else 0
    lines.append((mode, place.ravel(), row.max(initial=0) + column.max(initial=0) + 1))
  first, classes = {}, []
  spans = [
    (base, line[2], i)
    for i, ((_, base), line) in enumerate(zip(heads, lines, strict=True))
  ]
  for base, count, i in sorted(x for x in spans if heads[x[2]][0]):
    start = base if not classes or base > classes[-1] else classes[-1] + 1
    classes += range(start, base + count)
    first[i] = classes.index(base)
  for i, (mode, _) in enumerate(heads):
    if not mode:
      first[i] = len(classes)
      classes.append(None)
  part, data = inflate(data)
  normal = np.unpackbits(part[: ceil_div(len(classes), 8)], count=len(classes)) > 0
  present = np.unpackbits(part[ceil_div(len(classes), 8) :])
  present = iter(present.reshape(-1, ceil_div(size, 8) * 8))
  frequencies = np.zeros((len(classes), size), np.int64)
  frequencies[~normal] = stored_tables(data, np.count_nonzero(~normal), size)
  for k in np.flatnonzero(normal):
    if (symbols := np.int64(next(present)[:size])).any():
      frequencies[k] = normal_table(classes[k], symbols, *layout)
    else:
      frequencies[k, 0] = TOTAL
  places = [place + first[i] for i, (_, place, _) in enumerate(lines)]
  return np.concatenate(places), frequencies


def read_bands(data, classes, shifts):
  """The table of each element of known classes, frequencies and shifts of tables."""
  sizes, data = inflate(data)
  tables = stored_tables(data, sizes.size, 256)
  of_classes = np.arange(sizes.size).repeat(sizes)
  return of_classes[classes], tables, np.array(shifts)[np.cumsum(sizes) - 1]


# ---- blocks ----------------------------------------------------------------------


def read_symbols(message, lanes, contexts, tables):
  words = np.frombuffer(message, '<u2')
  x = words[3 : 3 + 2 * lanes].astype(np.uint32).reshape(2, lanes)
  x, width, start = x[0] | x[1] << 16, int(words[2]), 3 + 2 * lanes
  least, stop = int(words[0]) | int(words[1]) << 16, start + ceil_div(lanes * width, 2)
  sizes = words[start:stop].view(f'<u{width}')[:lanes] + np.int64(least)
  place = np.cumsum(sizes)
  words = np.append(words[stop:], 0).astype(np.uint32)
  void = np.zeros((1, tables.shape[1]), np.int64)
  void[0, 0] = TOTAL  # of places without an element
  tables = np.concatenate([tables, void])
  owners = np.array([np.repeat(np.arange(f.size), f) for f in tables])
  starts, tables = np.uint32(np.cumsum(tables, 1) - tables), np.uint32(tables)
  padding = np.full(-contexts.size % lanes, len(owners) - 1)
  places = np.append(contexts, padding).reshape(-1, lanes)
  symbols = np.empty(places.shape, np.uint64)
  for t, context in enumerate(places):
    slot = x & (TOTAL - 1)
    symbol = symbols[t] = owners[context, slot]
    x = tables[context, symbol] * (x >> 14) + slot - starts[context, symbol]
    place -= x < 1 << 16
    x = np.where(x < 1 << 16, x << 16 | words[place], x)
  return symbols.reshape(-1)[: contexts.size]


def read_block(data, lanes, contexts, tables, shifts, layout):
  """The bits of the elements of a block."""
  kind, dtype, r, f = layout
  s = np.uint64(shifts)[contexts]
  planes = [(8, s >= low + 8, 0 * s + low) for low in np.uint64(range(0, r & ~7, 8))]
  planes += [(b, s & b > 0, s & 256 - 2 * b) for b in np.uint64([4, 2, 1])]
  sizes = [ceil_div(int(has.sum() * b), 8) for b, has, _ in planes]
  *ends, _ = np.cumsum([len(data) - sum(sizes), *sizes])
  message, *planes_bytes = np.split(np.frombuffer(data, np.uint8), ends)
  symbols = read_symbols(message.tobytes(), lanes, contexts, tables)
  raw = np.zeros(symbols.size, np.uint64)
  for (b, has, low), plane in zip(planes, planes_bytes, strict=True):
    pieces = plane >> np.arange(0, 8, int(b), dtype=np.uint8)[:, None]
    pieces = (pieces & (1 << int(b)) - 1).reshape(-1)[: has.sum()]
    raw[has] |= pieces.astype(np.uint64) << low[has]
  if kind == 'difference':
    return np.int64(symbols << s | raw) - (128 << np.int64(s))
  if kind == 'int':
    folded = symbols << r | raw
    return folded if dtype.kind != 'i' else folded >> 1 ^ 0 - (folded & 1)
  width, m = 8 * dtype.itemsize, finfo(dtype).nmant
  raw = raw << m - 2 - r
  large = symbols << m - 3 | raw & (1 << m - 3) - 1
  exponent = f + 1 - m - (1 << finfo(dtype).nexp - 1)
  small = np.ldexp(np.where(large >> m, 0.0, large), exponent).astype(dtype)
  large = np.where(large >> m, large + (f - 1 << m), 0)
  return raw >> m - 3 << width - 1 | large | bits_of(small)


def read_blocks(blocks, lanes, elements, layout, contexts, tables, shifts):
  """The bits of the elements of a group."""
  runs = np.split(contexts, range(elements, contexts.size, elements))
  return np.concatenate(
    [
      read_block(block, lanes, run, tables, shifts, layout)
      for block, run in zip(blocks, runs, strict=True)
    ]
  )


# ---- arrays ----------------------------------------------------------------------


def parts_of(dtype, shape, crc32, groups, zeros):
  """The dtypes and shapes of the parts of an array."""
  if zeros is None:
    return [('uint32', shape)] * 2 if len(groups) == 2 else [(dtype, shape)]
  values, negative, transposed = zeros
  matrix = math.prod(shape[:-1]), math.prod(shape[-1:])
  lines, length = matrix[::-1] if transposed else matrix
  signs = ceil_div(lines * length - values, 8) if negative else 0
  masks = [('uint8', [lines, ceil_div(length, 8)]), ('uint8', [signs])]
  return [*masks, (dtype, [values // 128, 128]), (dtype, [values % 128])]


def joined(parts, shape, zeros):
  """The bits of an array."""
  if zeros is None:
    low, *high = parts
    return low | high[0].astype(np.uint64) << 32 if high else low
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
  bits = np.ascontiguousarray(bits.astype(f'u{np.dtype(dtype).itemsize}'))
  if zlib.crc32(bits.tobytes()) != crc32:
    raise ValueError('an array is damaged')
  return bits.view(dtype).reshape(shape)


def read_differences(head, decoded, array, classes, shifts):
  """An array whose elements have known classes."""
  return checked(decoded(*read_bands(head, classes, shifts)), array)


def read_record(spec, stream):
  """The arrays of a record; functions for those of known classes."""
  take, arrays = io.BytesIO(stream).read, spec['arrays']
  heads = [take(group[3]) for group in spec['groups']]
  bodies = [[take(n) for n in group[6]] for group in spec['groups']]
  parts = [
    (np.dtype(dtype), shape, array[3][j], (i, j))
    for i, array in enumerate(arrays)
    for j, (dtype, shape) in enumerate(parts_of(*array))
  ]
  content, known = {}, {}
  for g, (kind, r, f, _, lanes, n, _) in enumerate(spec['groups']):
    members = [part for part in parts if part[2] == g]
    layout = kind, members[0][0], r, f
    decoded = functools.partial(read_blocks, bodies[g], lanes, n, layout)
    if kind == 'difference':
      i, _ = members[0][3]
      known[i] = functools.partial(read_differences, heads[g], decoded, arrays[i])
      continue
    contexts, tables = read_tables(heads[g], [x[1] for x in members], layout)
    bits = decoded(contexts, tables, np.full(len(tables), r))
    ends = np.cumsum([math.prod(x[1]) for x in members])
    for (dtype, shape, _, key), part in zip(
      members, np.split(bits, ends[:-1]), strict=True
    ):
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
    new = moved(bits[at], a['differences'].astype(bits.dtype), name)
    new[a['differences'] == -128] = bits_of(a.get('exceptions', new[:0]), 'i')
    bits[at] = new
  if 'column_scales' in a:
    whole, w = bits.reshape(-1, s['width']), 8 * bits.itemsize
    b = predicted(whole, s, a)
    m, e = w + 1, np.zeros(b.shape, np.int64)
    if is_float(name):
      m = finfo(name).nmant
      e = 8 * np.maximum(np.int64((b & np.iinfo(b.dtype).max) >> m), 1)
    level = (np.int64(a['row_scales'])[:, None] + a['column_scales'] - e) >> 1
    levels = np.arange(-24, 4 * (m - 1))
    shifts = np.append(np.clip(levels // 4 - 3, 0, w - 8), w - 8)
    classes = np.clip(level + 24, 0, shifts.size - 1).ravel()
    x = a['differences'](classes, shifts)
    bits = moved(b.ravel(), x, name)
    far = x == -1 << shifts[classes] + 7
    bits[far] = bits_of(a.get('exceptions', bits[:0]), 'i')
  return bits.view(s['name']).reshape(s['lengths'])


# ---- products --------------------------------------------------------------------


def subspace(s, a):
  t, (m, d) = np.float64(a['tangent']) * s['step'], a['tangent'].shape
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


def reduced_low_rank(s, a):
  basis = np.roll(gram_basis(a['below']), -len(a['other']), axis=0)
  return basis @ a['other'] * line_factors(a, 'basis', 'other')


def head_columns(s, a):
  heads = np.split(a['below'], s['heads'], 1)
  rotary = np.split(a.get('rotary', np.zeros((0, s['heads']))), s['heads'], 1)
  pairs = zip(rotary, map(gram_basis, heads), strict=True)
  return np.hstack([x for pair in pairs for x in pair if x.size])


def head_rows(s, a):
  first, rows = a['first'], []
  others = a.get('others', np.zeros((0, first.shape[1] + s['head_dim'])))
  for f, o in zip(*(np.split(x, s['groups']) for x in (first, others)), strict=True):
    whole = np.hstack([f, *o.reshape(-1, len(f), o.shape[1])])
    rows += [np.hstack([gram_basis(whole.T)[: len(f)], f]), o]
  return np.vstack(rows)


LEAVES = {
  'difference': difference,
  'basis': lambda s, a: a['numbers'] * np.int32(s['step']),
  'subspace': subspace,
  'constant': lambda s, a: np.full(s['tail'], a['value']),
  'low_rank': lambda s, a: a['u'] @ a['v'],
  'identity_minus_gram': identity_minus_gram,
  'trapezoidal_rows': lambda s, a: np.vstack([*a.get('full', []), *a['lower'].T]),
  'reduced_low_rank': reduced_low_rank,
  'head_columns': head_columns,
  'head_rows': head_rows,
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
  is_turned = s.get('transposed') or s.get('columns_first')
  return (array.T if is_turned else array).astype(s['dtype'])


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
