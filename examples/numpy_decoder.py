"""A second reader of rotbits files, in plain NumPy, from docs/format*.md alone.

  python examples/numpy_decoder.py FILE OUTPUT.safetensors [BASE.safetensors]

It writes the parameters by their paths, and shares no code with the package. It checks
checksums only: give it no files from strangers. Arrays of floats are bit patterns.
"""

import io
import json
import math
import pathlib
import sys
import zlib

import numpy as np

EXPONENT = {'float16': 5, 'bfloat16': 8, 'float32': 8}
MANTISSA = {'float16': 10, 'bfloat16': 7, 'float32': 23}
MANTISSA |= {'float8_e4m3fn': 3, 'float8_e5m2': 2}
TOTAL = 1 << 14
np.seterr(over='ignore', invalid='ignore')  # of numbers that are not final yet


def ceil_div(a, b):
  return -(-a // b)


def bits_dtype(dtype):
  """The dtype of the bits of a float, and an integer's own."""
  if 'float8' in dtype:
    return np.dtype('u1')
  return np.dtype(f'u{int(dtype[-2:]) // 8}' if 'float' in dtype else dtype)


def signed(bits):
  return bits.view(f'i{bits.itemsize}')


def widen(bits, dtype):
  if dtype == 'bfloat16':
    return (bits.astype(np.uint32) << 16).view(np.float32)
  return bits.view(dtype).astype(np.float32 if dtype in EXPONENT else dtype)


def narrow(numbers, dtype):
  if dtype == 'bfloat16':
    bits = np.float32(numbers).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
  return np.ascontiguousarray(numbers.astype(dtype)).view(bits_dtype(dtype))


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
    w = np.maximum(e, 1) - (1 << EXPONENT[dtype] - 1) - 3 + f
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
  spans = [
    (head[1], line[2], i)
    for i, (head, line) in enumerate(zip(heads, lines, strict=True))
  ]
  first, classes = {}, []
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
    return folded if dtype[0] != 'i' else folded >> 1 ^ 0 - (folded & 1)
  width, m = 8 * bits_dtype(dtype).itemsize, MANTISSA[dtype]
  raw = raw << m - 2 - r
  large = symbols << m - 3 | raw & (1 << m - 3) - 1
  exponent = f + 1 - m - (1 << EXPONENT[dtype] - 1)
  small = narrow(np.ldexp(np.where(large >> m, 0.0, large), exponent), dtype)
  large = np.where(large >> m, large + (f - 1 << m), 0)
  return raw >> m - 3 << width - 1 | large | small


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


def read_record(spec, stream):
  """The arrays of a record with their dtypes; functions for those of known classes."""
  take, arrays = io.BytesIO(stream).read, spec['arrays']
  heads = [take(group[3]) for group in spec['groups']]
  bodies = [[take(n) for n in group[6]] for group in spec['groups']]
  parts = [
    (*part, group, (i, j))
    for i, array in enumerate(arrays)
    for j, (part, group) in enumerate(zip(parts_of(*array), array[3], strict=True))
  ]
  content, known = {}, {}
  for g, (kind, r, f, _, lanes, n, _) in enumerate(spec['groups']):
    members = [part for part in parts if part[2] == g]
    layout = kind, members[0][0], r, f

    def decoded(contexts, tables, shifts, g=g, lanes=lanes, n=n, layout=layout):
      runs = np.split(contexts, range(n, contexts.size, n))
      pairs = zip(bodies[g], runs, strict=True)
      blocks = [read_block(x, lanes, y, tables, shifts, layout) for x, y in pairs]
      return np.concatenate(blocks)

    if kind == 'difference':
      (i, _), dtype, shape = members[0][3], *members[0][:2]

      def differences(classes, shifts, g=g, decoded=decoded, dtype=dtype, i=i):
        numbers = decoded(*read_bands(heads[g], classes, shifts)).astype(dtype)
        return checked(numbers, dtype, arrays[i])[0]

      known[i] = differences
      continue
    shapes = [shape for _, shape, *_ in members]
    contexts, tables = read_tables(heads[g], shapes, layout)
    bits = decoded(contexts, tables, np.full(len(tables), r))
    for dtype, shape, _, key in members:
      size = math.prod(shape)
      content[key], bits = (
        bits[:size].astype(bits_dtype(dtype)).reshape(shape),
        bits[size:],
      )
  for dtype, shape, group, key in parts:
    if group is None:
      data = take(math.prod(shape) * bits_dtype(dtype).itemsize)
      content[key] = np.frombuffer(data, bits_dtype(dtype)).reshape(shape)
  for i, array in enumerate(arrays):
    if i in known:
      yield known[i], array[0]
    else:
      bits = joined([content[i, j] for j in range(len(array[3]))], array[1], array[4])
      yield checked(bits, array[0], array)


def checked(bits, dtype, array):
  bits = np.ascontiguousarray(bits.astype(bits_dtype(dtype))).reshape(array[1])
  if zlib.crc32(bits.tobytes()) != array[2]:
    raise ValueError('an array is damaged')
  return bits, dtype


# ---- differences -----------------------------------------------------------------


def flipped(x):
  return x ^ (x >> 8 * x.itemsize - 1 & np.iinfo(x.dtype).max)


def moved(known, difference, dtype):
  """The bits of elements that differ from known ones."""
  if 'float' not in dtype:
    return known + difference
  sign = known & np.iinfo(known.dtype).min
  return flipped((known ^ sign) + difference) ^ sign


def embedding_bits(s, a):
  """The bits of an embedding that is predicted from the head."""
  head, dtype = s['head']
  m = MANTISSA[s['name']]
  h = np.rint(np.ldexp(np.float64(widen(head, dtype)), a['shifts'][:, None]))
  p = np.ldexp(h.T @ np.float64(a['map']), -s.get('scale', 0))
  bits, least = (
    lambda x: np.float64(x).view(np.int64),
    2.0 ** (2 - 2 ** (EXPONENT[s['name']] - 1)),
  )
  o = (bits(np.maximum(abs(p), least)) + (1 << 51 - m) >> 52 - m) - (
    bits(least) >> 52 - m
  )
  o += np.int64(np.rint(np.minimum(abs(p), least) * (2.0**m / least)))
  o = np.minimum(o, 32767)
  return np.where(p < 0, o | -32768, o).astype(np.int16)


def known_bits(s, a):
  """The bits of the known array, cut or filled with zeros."""
  if 'map' in a:
    return embedding_bits(s, a).ravel()
  (bits, dtype), n = s['known'], math.prod(s['lengths'])
  bits = bits if dtype == s['name'] else narrow(widen(bits, dtype), s['name'])
  bits = signed(np.ravel(bits)[:n])
  return np.pad(bits, (0, n - bits.size))


def predicted(b, rows, s, a):
  """The bits of the rows that may differ, before the differences."""
  name = s['name']
  if 'left' in a:
    wide = np.float64(widen(b.view(bits_dtype(name)), name))
    product = np.float64(a['left'][rows]) @ a['right']
    near = narrow(np.float32(wide + np.ldexp(product, s.get('unit', 0))), name)
    b = np.where(np.isfinite(wide), signed(near), b)
  if 'drift' in a:
    m, top = MANTISSA[name], b & np.iinfo(b.dtype).max
    drift = a['drift'][top >> max(m - 8, 0) & min((1 << m) - 1, 255)]
    b = b + drift.astype(b.dtype) * ((top >> m) % ((1 << EXPONENT[name]) - 1) > 0)
  return b


def difference(s, a):
  name, bits = s['name'], known_bits(s, a)
  if 'gaps' in a:
    is_last = a['gaps'] < 65535
    at = np.cumsum(np.int64(a['gaps']) + is_last)[is_last] - 1
    new = moved(bits[at], a['differences'].astype(bits.dtype), name)
    new[a['differences'] == -128] = a.get('exceptions', new[:0])
    bits[at] = new
  if 'column_scales' in a:
    whole, w = bits.reshape(-1, s['width']), 8 * bits.itemsize
    rows = np.unpackbits(a.get('equal', np.zeros(len(whole), 'u1')), bitorder='little')
    rows = rows[: len(whole)] == 0
    b = predicted(whole[rows], rows, s, a)
    e = (b & np.iinfo(b.dtype).max) >> MANTISSA[name] if name in MANTISSA else 0 * b
    e = 8 * np.maximum(np.int64(e), name in MANTISSA)
    level = (np.int64(a['row_scales'])[:, None] + a['column_scales'] - e) >> 1
    levels = np.arange(-24, 4 * (MANTISSA.get(name, w + 1) - 1))
    shifts = np.append(np.clip(levels // 4 - 3, 0, w - 8), w - 8)
    classes, last = np.clip(level + 24, 0, shifts.size - 1).ravel(), shifts.size - 1
    x, b = a['differences'](classes, shifts), b.ravel()
    new = moved(b, x, name)
    far = (classes < last) & (x == -1 << shifts[classes] + 7)
    new[far] = a.get('exceptions', new[:0])
    u = (x ^ np.iinfo(x.dtype).min).view(f'u{x.itemsize}')
    new = np.where(classes == last, signed(u >> 1 | u << w - 1), new)
    whole[rows] = new.reshape(-1, s['width'])
  return bits.reshape(s['lengths'])


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
  """The bits of a product with tensors of the dense model."""
  rounded = lambda x: np.float64(
    widen(narrow(np.float32(x), name), name) if p.get('rounded') else x
  )
  power = lambda x, k: k - np.frexp(abs(x).max(-1, keepdims=True))[1]
  k = 26 - (hidden.bit_length() + 1) // 2
  if p['kind'] == 'shortcut':
    v, w = (2.0**25 * np.eye(hidden) if x is None else x for x in bases)
    return narrow(np.float32(np.ldexp(v.T @ w, -50)), name)
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
  return narrow(np.float32(x.T if p['kind'] == 'reads' else x), name)


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
  'constant': lambda s, a: np.full(s['tail'], a['value']),
  'low_rank': lambda s, a: a['u'] @ a['v'],
  'identity_minus_gram': identity_minus_gram,
  'trapezoidal_rows': lambda s, a: np.vstack([*a.get('full', []), *a['lower'].T]),
  'reduced_low_rank': reduced_low_rank,
  'head_columns': head_columns,
  'head_rows': head_rows,
  'tied': lambda s, a: widen(*s['head']).T @ a['map'],
  'uniformly_quantized': lambda s, a: (
    a['integers'] * a['step'] * line_factors(a, 'row', 'column')
  ),
}
"""Numbers of leaves with the settings s and the arrays a."""

EXACT = {
  'difference': difference,
  'basis': lambda s, a: np.int32(a['numbers'] * s['step']),
  'subspace': subspace,
}
"""Bits of leaves, from bits."""


def expand(kind, s, arrays):
  """The bits of the array that a leaf stands for."""
  if kind in EXACT:
    bits = EXACT[kind](s, {name: x for name, (x, _) in arrays.items()})
    bits = bits.T if s.get('columns_first') else bits
    return bits.view(bits_dtype(s['dtype']))
  a = {name: widen(x, dtype) for name, (x, dtype) in arrays.items()}
  for name in [x for x in a if f'{x}_step' in a]:  # multiples of a step
    a[name] = a[name] * a.pop(f'{name}_step')
  for name in [x for x in a if f'{x}_corner' in a]:  # lower triangles
    corner, below = a.pop(f'{name}_corner'), a[name]
    n, columns = (math.isqrt(8 * corner.size + 1) - 1) // 2, below.shape[1]
    (top := np.tril(np.ones((n, columns))))[top > 0] = corner
    a[name] = np.vstack([top, below])
  numbers = LEAVES[kind](s, a)
  return narrow(numbers.T if s.get('transposed') else numbers, s['dtype'])


# ---- files -----------------------------------------------------------------------


def read_base(path):
  """The bits and dtypes of a safetensors file."""
  if path is None:
    return {}
  data, content = pathlib.Path(path).read_bytes(), {}
  start = 8 + int.from_bytes(data[:8], 'little')
  names = {'BF16': 'bfloat16', 'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2'}
  names |= {'BOOL': 'bool', 'F': 'float', 'U': 'uint', 'I': 'int'}
  for key, x in json.loads(data[8:start]).items():
    if key != '__metadata__':
      dtype = names.get(x['dtype']) or names[x['dtype'][0]] + x['dtype'][1:]
      part = data[start:][slice(*x['data_offsets'])]
      content[key] = np.frombuffer(part, bits_dtype(dtype)).reshape(x['shape']), dtype
  return content


def known_array(leaf, s, base, tensors, config):
  """The array of a base, or the product, beside which a leaf is stored."""
  p = leaf.get('product')
  needed = p.get('arrays', []) if p else [leaf['base']]
  transposed = s.get('columns_first')
  for path, *_, crc32 in needed:
    bits = base[path][0].T if transposed else base[path][0]
    if zlib.crc32(bits.tobytes()) != crc32:
      raise ValueError(f'{leaf["path"]} needs another base')
  if not p:
    return bits, base[needed[0][0]][1]
  bases = [tensors.get(f'subspaces.{i}/basis') for i in p.get('segments', [])]
  bases = [x and np.float64(signed(x[0])) for x in bases]
  arrays = [widen(*base[path]) for path, *_ in needed]
  return product(p, arrays, bases, s['dtype'], config['hidden_size']), s['dtype']


def read_leaf(leaf, arrays, base, tensors, config):
  """The bits of a leaf, and their dtype."""
  if 'type_name' not in leaf:
    (bits, dtype), shift = arrays[''], {'int2': 6, 'int4': 4}.get(leaf['dtype'])
    return (signed(bits) << shift >> shift).view('u1') if shift else bits, dtype
  s = dict(leaf.get('settings', {}), dtype=leaf['dtype'])
  s['head'] = tensors.get('head/kernel')
  if 'base' in leaf or 'product' in leaf:
    s['known'] = known_array(leaf, s, base, tensors, config)
  bits = expand(leaf['type_name'], s, arrays).reshape(leaf['shape'])
  stored = bits.T if s.get('columns_first') else bits
  if leaf.get('crc32') not in (None, zlib.crc32(stored.tobytes())):
    raise ValueError(f'{leaf["path"]} is damaged')
  return bits, leaf['dtype']


def main(path, output, base=None):
  base, data = read_base(base), pathlib.Path(path).read_bytes()
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
  header, end = {'__metadata__': {'empty': json.dumps(empty)}}, 0
  tensors = {k: x for k, x in tensors.items() if not k.startswith('subspaces.')}
  for name, (bits, dtype) in tensors.items():
    dtype = dtype.replace('loat', '').replace('int', 'i').replace('ui', 'u').upper()
    header[name] = {'dtype': dtype, 'shape': bits.shape}
    header[name]['data_offsets'] = [end, end := end + bits.nbytes]
  text = json.dumps(header).encode()
  body = b''.join(bits.tobytes() for bits, _ in tensors.values())
  pathlib.Path(output).write_bytes(len(text).to_bytes(8, 'little') + text + body)


if __name__ == '__main__':
  main(*sys.argv[1:])
