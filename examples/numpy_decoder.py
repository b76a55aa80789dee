"""A second reader of rotbits files, in plain NumPy, from docs/format*.md alone.

  python examples/numpy_decoder.py FILE OUTPUT.safetensors [BASE.safetensors]

It writes the parameters by their paths, and shares no code with the package. It checks
checksums only: give it no files from strangers. Arrays are bit patterns.
"""

# fmt: off
import io
import json
import math
import pathlib
import sys
import zlib

import numpy as np

FLOATS = {'float16': (16, 5, 10), 'bfloat16': (16, 8, 7), 'float32': (32, 8, 23)}
TOTAL, CEIL = 1 << 14, lambda a, b: -(-a // b)
BITS = lambda dtype: np.dtype(
  f'u{int(dtype[-2:]) // 8}' if 'float' in dtype else dtype)
INFLATE = lambda z, data: (np.frombuffer(z.decompress(data), np.uint8), z.unused_data)
FLIP = lambda x: x ^ (x >> 8 * x.itemsize - 1 & np.iinfo(x.dtype).max)
UNFOLD = lambda u, dtype: u if dtype[0] != 'i' else u >> 1 ^ 0 - (u & 1)
PAD = lambda x, s: np.pad(x, ((0, 0), (0, s['columns'] - len(x))))
TURN = lambda x, s: x.T if s.get('columns_first') else x
BASIS = lambda b: np.concatenate([np.eye(b.shape[1]) - b.T @ b / 4, b])
np.seterr(over='ignore', invalid='ignore')  # of numbers that are not final yet
def widen(bits, dtype):
  if dtype == 'bfloat16':
    return (bits.astype(np.uint32) << 16).view(np.float32)
  return bits.view(dtype).astype(np.float32 if dtype in FLOATS else dtype)
def narrow(numbers, dtype):
  if dtype == 'bfloat16':
    bits = np.float32(numbers).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
  return np.ascontiguousarray(numbers.astype(dtype)).view(BITS(dtype))
def normal_table(k, present, kind, dtype, r, f):  # frequencies [A], class k
  symbol = np.arange(present.size)
  if kind == 'float':
    e, m = symbol >> 3, symbol % 8
    w = np.maximum(e, 1) - (1 << FLOATS[dtype][1] - 1) - 3 + f
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
def read_tables(data, shapes, layout):  # each element's table; frequencies [K + 1, A]
  part, data = INFLATE(zlib.decompressobj(-15), data)
  take, lines, runs = io.BytesIO(part).read, [], []
  first, classes, contexts = {}, [], []
  read = lambda n, has: np.int64(np.frombuffer(take(n) if has else bytes(n), np.uint8))
  size = int.from_bytes(take(2), 'little')
  heads = np.frombuffer(take(4 * len(shapes)), '<i2').reshape(-1, 2).tolist()
  for i, ((mode, base), shape) in enumerate(zip(heads, shapes, strict=True)):
    line = read(math.prod(shape[:-1]), mode in (2, 4))[:, None]
    line = line + read(math.prod(shape[-1:]), mode in (3, 4))
    runs += [(base, line.max() + 1, i)] if mode else []
    lines.append((mode, line.reshape(-1)))
  for base, count, i in sorted(runs):
    classes += range(max([base, *(k + 1 for k in classes[-1:])]), base + count)
    first[i] = classes.index(base)
  for i, (mode, line) in enumerate(lines):
    contexts.append(line + (first[i] if mode else len(classes)))
    classes += [] if mode else [None]
  part, data = INFLATE(zlib.decompressobj(-15), data)
  count = len(classes)
  normal = np.unpackbits(part[: CEIL(count, 8)], count=count)
  present = iter(np.unpackbits(part[CEIL(count, 8) :]).reshape(-1, CEIL(size, 8) * 8))
  frequencies = stored_tables(data, normal == 0, size)
  for k, own in enumerate(frequencies[:-1]):
    if normal[k] and (symbols := np.int64(next(present)[:size])).any():
      own[:] = normal_table(classes[k], symbols, *layout)
  return np.concatenate(contexts), frequencies
def stored_tables(data, stored, size):  # frequencies [K + 1, A], of void places last
  low, high = np.frombuffer(zlib.decompress(data), np.uint8).reshape(2, -1)
  values = iter((low + 256 * np.int64(high)).tolist())
  frequencies = TOTAL * np.eye(1, size, dtype=np.int64).repeat(stored.size + 1, 0)
  for own in (frequencies[k] for k in np.flatnonzero(stored)):
    own[0], first, last = 0, next(values), next(values) + 1
    own[first:last] = [next(values) for _ in range(first, last)]
  return frequencies
def read_symbols(message, lanes, contexts, table):  # the symbols of a block
  words = np.frombuffer(message, '<u2')
  x = words[3 : 3 + 2 * lanes].astype(np.uint32).reshape(2, lanes)
  x, b, start = x[0] | x[1] << 16, int(words[2]), 3 + 2 * lanes
  least, stop = int(words[0]) | int(words[1]) << 16, start + CEIL(lanes * b, 2)
  place = np.cumsum(words[start:stop].view(f'<u{b}')[:lanes] + np.int64(least))
  words = np.append(words[stop:], 0).astype(np.uint32)
  owners = np.array([np.repeat(np.arange(f.size), f) for f in table])
  starts, table = np.uint32(np.cumsum(table, 1) - table), np.uint32(table)
  places = np.append(contexts, np.full(-contexts.size % lanes, len(owners) - 1))
  found = np.empty((places.size // lanes, lanes), np.uint64)
  for t, context in enumerate(places.reshape(-1, lanes)):
    slot = x & (TOTAL - 1)
    symbol = found[t] = owners[context, slot]
    x = table[context, symbol] * (x >> 14) + slot - starts[context, symbol]
    place -= x < 1 << 16
    x = np.where(x < 1 << 16, x << 16 | words[place], x)
  return found.reshape(-1)[: contexts.size]
def read_plane(data, b, n):  # n pieces of b bits
  planes = np.frombuffer(data, np.uint8) >> np.arange(0, 8, b, dtype=np.uint8)[:, None]
  return (planes & (1 << b) - 1).reshape(-1)[:n].astype(np.uint64)
def read_block(data, lanes, contexts, table, kind, dtype, r, f):  # bit patterns
  n, pieces = contexts.size, (8,) * (r // 8) + tuple(b for b in (4, 2, 1) if r & b)
  end = len(data) - sum(CEIL(n * b, 8) for b in pieces)
  symbols = read_symbols(data[:end], lanes, contexts, table)
  raw, shift = np.zeros(n, np.uint64), 0
  for b in pieces:
    raw |= read_plane(data[end : end + CEIL(n * b, 8)], b, n) << shift
    end, shift = end + CEIL(n * b, 8), shift + b
  if kind == 'float':
    width, e, m = FLOATS[dtype]
    raw = raw << m - 2 - r
    large = symbols << m - 3 | raw & (1 << m - 3) - 1
    small = np.ldexp(np.where(large >> m, 0.0, large), f + 1 - m - (1 << e - 1))
    large = np.where(large >> m, large + (f - 1 << m), 0)
    return raw >> m - 3 << width - 1 | large | narrow(small, dtype)
  return UNFOLD(symbols << r | raw, dtype)
def parts_of(dtype, shape, groups, zeros):  # dtypes and shapes of the parts
  if not zeros:
    return [('uint32' if len(groups) == 2 else dtype, shape)] * len(groups)
  (n, negative, transposed), matrix = zeros, [math.prod(shape[:-1]), shape[-1]]
  lines, length = matrix[::-1] if transposed else matrix
  signs = CEIL(math.prod(shape) - n, 8) if negative else 0
  return [('uint8', [lines, CEIL(length, 8)]), ('uint8', [signs]),
    (dtype, [n // 128, 128]), (dtype, [n % 128])]
def joined(parts, dtype, shape, zeros):  # the bit patterns of an array
  if not zeros:
    return parts[0] if len(parts) == 1 else parts[0] | parts[1].astype('u8') << 32
  mask, signs, *values = parts
  bits = np.zeros([math.prod(shape[:-1]), shape[-1]], BITS(dtype))
  target = bits.T if zeros[2] else bits
  has = np.unpackbits(mask, axis=1, count=target.shape[1]) > 0
  target[has] = np.concatenate([x.reshape(-1) for x in values])
  if zeros[1]:
    negative = np.unpackbits(signs, count=bits.size - zeros[0]).astype(bits.dtype)
    target[~has] = negative << 8 * bits.itemsize - 1
  return bits
def read_record(coder, stream):  # returns the arrays of a record, with their dtypes
  take, specs, found = io.BytesIO(stream).read, coder['arrays'], {}
  parts = [(*part, group, (i, j)) for i, x in enumerate(specs) for j, (part, group)
    in enumerate(zip(parts_of(x[0], x[1], *x[3:]), x[3], strict=True))]
  groups = []
  for number, (kind, r, f, nbytes, *blocks) in enumerate(coder['groups']):
    own = [part for part in parts if part[2] == number]
    layout = kind, own[0][0], r, f
    tables = read_tables(take(nbytes), [shape for _, shape, *_ in own], layout)
    groups.append((own, layout, tables, *blocks))
  for own, layout, (contexts, table), lanes, n, sizes in groups:
    own_contexts = np.split(contexts, range(n, contexts.size, n))
    bits = np.concatenate([read_block(take(size), lanes, x, table, *layout)
      for size, x in zip(sizes, own_contexts, strict=True)])
    for dtype, shape, _, key in own:
      size = math.prod(shape)
      found[key], bits = bits[:size].astype(BITS(dtype)).reshape(shape), bits[size:]
  for dtype, shape, group, key in parts:
    if group is None:
      data = take(math.prod(shape) * BITS(dtype).itemsize)
      found[key] = np.frombuffer(data, BITS(dtype)).reshape(shape)
  for i, (dtype, shape, crc32, own, *form) in enumerate(specs):
    bits = joined([found[i, j] for j in range(len(own))], dtype, shape, *form)
    bits = np.ascontiguousarray(bits.astype(BITS(dtype))).reshape(shape)
    if zlib.crc32(bits.tobytes()) != crc32:
      raise ValueError('an array is damaged')
    yield bits, dtype
def corrected(bits, residuals, exceptions):
  bits = FLIP(FLIP(bits.view(f'i{bits.itemsize}')) + residuals).view(exceptions.dtype)
  bits[residuals == -128] = exceptions
  return bits
def tied_exactly(s, a):
  _, exponent, mantissa = FLOATS[s['dtype']]
  m = np.float64(a['map'])
  h = np.rint(np.ldexp(np.float64(widen(*s['head'])), a['shifts'][:, None]))
  p = np.ldexp(h.T @ m, -s['scale'])
  bits, least = lambda x: np.float64(x).view(np.int64), 2.0 ** (2 - 2 ** (exponent - 1))
  o = bits(np.maximum(abs(p), least)) + (1 << 51 - mantissa) >> 52 - mantissa
  o += np.int64(np.rint(np.minimum(abs(p), least) * (2.0**mantissa / least)))
  o = np.minimum(o - (bits(least) >> 52 - mantissa), 32767)
  count = sum(name.startswith('residuals_') for name in a)
  c = np.clip(o >> mantissa, s['first'], s['first'] + count - 1) - s['first']
  off = np.empty(o.shape, np.int8)
  for i in range(count):
    off[c == i] = a[f'residuals_{i}']
  return corrected(np.uint16(np.where(p < 0, o | 0x8000, o)), off, a['exceptions'])
def quantized(s, a):
  grown = lambda x, n: np.repeat(np.float32(x), n // x.shape[1], axis=1)
  def of_elements(name):  # the scales or the offsets of all elements
    x, units = a[f'{name}s'], a.get(f'{name}_units')
    x = x if units is None else np.float32(x) * grown(units, x.shape[1])
    return grown(x, a['codes'].shape[1])
  numbers = np.float32(a['codes']) * of_elements('scale')
  return numbers + of_elements('offset') if 'offsets' in a else numbers
def lines(a, *names):
  found = [np.int32(a.get(f'{x}_exponents', [0])) for x in names]
  rows, columns = (np.ldexp(np.float32(4 + e % 4), e // 4 - 2) for e in found)
  return rows[:, None] * columns
def multiples(s, a):
  return a['integers'] * a['step'] * lines(a, 'row', 'column')
SIGNED = lambda x: x.view(f'i{x.itemsize}')
MANTISSA = {'float8_e4m3fn': 3, 'float8_e5m2': 2} | {k: x[2] for k, x in FLOATS.items()}
def base_of(s):  # the bits of the base, and what adds differences to bits
  (bits, dtype), n = s['base'], math.prod(s['lengths'])
  bits = bits if dtype == s['name'] else narrow(widen(bits, dtype), s['name'])
  bits = SIGNED(np.ravel(bits)[:n])
  h = np.iinfo(bits.dtype).min if 'float' in s['name'] else 0
  flip = FLIP if h else np.array
  moved = lambda b, d: flip((b ^ b & h) + d.astype(b.dtype)) ^ b & h
  return np.pad(bits, (0, n - bits.size)), moved
def read_given(a, s, contexts, shifts, lane=8192):  # symbols with their raw bits
  table, *blocks = np.split(a['coded'], np.cumsum(s['parts'])[:-1])
  table = stored_tables(table.tobytes(), np.ones(len(shifts)), 256)
  n, found = max(CEIL(contexts.size, len(blocks) or 1), 1), [np.uint64([])]
  for block, start in zip(blocks, range(0, contexts.size, n), strict=True):
    s = np.uint64(shifts)[own := contexts[start : start + n]]
    planes = [(8, s > low + 7, 0 * s + low) for low in np.uint64([0, 8, 16])]
    planes += [(b, s & b > 0, s & 256 - 2 * b) for b in np.uint64([4, 2, 1])]
    sizes = [CEIL(int(has.sum() * b), 8) for b, has, _ in planes]
    words, *raw = np.split(block, block.size - np.cumsum(sizes[::-1])[::-1])
    lanes = min(max(n // lane, 1), 64)
    found.append(read_symbols(words.tobytes(), lanes, own, table) << s)
    for (b, has, low), plane in zip(planes, raw, strict=True):
      found[-1][has] |= read_plane(plane, int(b), has.sum()) << low[has]
  return np.int64(np.concatenate(found))
def patched(s, a):
  bits, moved = base_of(s)
  own = np.arange(2).repeat((m := s['changes'], s['gaps']))
  x, gaps = np.split(read_given(a, s, own, (0, s['shift']), 1024), [m])
  at = np.cumsum(gaps + (ends := gaps < (256 << s['shift']) - 1))[ends] - 1
  bits[at] = moved(bits[at], x - 128)
  bits[at[x == 0]] = SIGNED(a.get('values', bits[:0]))
  return bits.reshape(s['lengths'])
def relative(s, a):
  (bits, moved), name = base_of(s), s['name']
  head, whole = zlib.decompress(a['head']), bits.reshape(-1, s['width'])
  sizes, shifts = np.int64(list(head[1 : (n := 1 + 2 * head[0])])).reshape(2, -1)
  scales = np.frombuffer(head[n:], np.uint8).reshape(2, -1).T.copy().view('<i2').ravel()
  b = whole[rows := scales[: len(whole)] != -32768]
  if 'left' in a:
    wide = widen(b.view(BITS(name)), name)
    product = np.float64(SIGNED(a['left'])[rows]) @ SIGNED(a['right'])
    found = narrow(np.float32(wide + np.ldexp(product, s['unit'])), name)
    b = np.where(np.isfinite(wide), SIGNED(found), b)
  if 'drift' in a:
    (_, e, m), top = FLOATS[name], b & np.iinfo(b.dtype).max
    drift = SIGNED(a['drift'])[top >> max(m - 8, 0) & min((1 << m) - 1, 255)]
    b = b + drift.astype(b.dtype) * ((top >> m) % ((1 << e) - 1) > 0)
  level = np.int64(scales[: len(whole)][rows])[:, None] + scales[len(whole) :]
  level -= 8 * np.maximum((b & np.iinfo(b.dtype).max) >> MANTISSA[name], 1
    ) if name in MANTISSA else 0
  own = np.arange(sizes.size).repeat(sizes)[
    np.clip((level >> 1) - s['first'], 0, sizes.sum() - 1).ravel()]
  x, b = read_given(a, s, own, shifts), b.ravel()
  alone = (x >> 1 | x << 8 * b.itemsize - 1).astype(b.dtype)
  found = np.where(own == sizes.size - 1, alone, moved(b, x - (128 << shifts[own])))
  found[x >> shifts[own] == 0] = SIGNED(a.get('values', found[:0]))
  whole[rows] = found.reshape(-1, s['width'])
  return bits.reshape(s['lengths'])
def basis(s, a):
  return np.int32(a['numbers'] * s['step']).view(BITS('int32'))
def subspace(s, a):
  t, (m, d) = np.float64(a['tangent']) * s['step'], a['tangent'].shape
  one = lambda n: 2.0**25 * np.eye(n)
  scaled = lambda x: np.rint(x * 2.0**-25)
  g, z = scaled(t @ t.T) + one(m), np.rint(one(m) * (2 / 3))
  for _ in range(5):
    z = scaled(z @ (2 * one(m) - scaled(g @ z)))
  low = 2 * scaled(z @ t)
  top = np.unpackbits(a['mask'], count=m + d, bitorder='little') > 0
  found = np.empty((m + d, d), np.int32)
  found[top], found[~top] = one(d) - scaled(t.T @ low), low
  return found.view(BITS('int32'))
def product(p, arrays, bases, name, hidden):  # the bit patterns of a product
  rounded = lambda x: np.float64(widen(narrow(np.float32(x), name), name)
    if p.get('rounded') else x)
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
def head_rows(s, a):
  first, rows = a['first'], []
  others = a.get('others', np.zeros((0, first.shape[1] + s['head_dim'])))
  for f, o in zip(*(np.split(x, s['groups']) for x in (first, others)), strict=True):
    whole = np.hstack([f, *o.reshape(-1, len(f), o.shape[1])])
    rows += [np.hstack([BASIS(whole.T)[: len(f)], f]), o]
  return np.vstack(rows)
LEAVES = {  # numbers, or bit patterns, of leaves with settings s and arrays a
  'constant': lambda s, a: np.full(s['tail'], a['value']),
  'low_rank': lambda s, a: a['u'] @ a['v'],
  'identity_minus_gram': lambda s, a: PAD(np.eye(len(a['b'])) - a['b'] @ a['b'].T
    + a['c'] @ a['c'].T, s),
  'trapezoidal_rows': lambda s, a: np.vstack([*a.get('full', []), *a['lower'].T]),
  'reduced_low_rank': lambda s, a:
    np.roll(BASIS(a['below']), -len(a['other']), axis=0) @ a['other']
    * lines(a, 'basis', 'other'),
  'head_columns': lambda s, a: np.hstack([x for r, b in zip(*(np.split(a.get(n,
    a['below'][:0]) if n in a else np.zeros((0, s['heads'])), s['heads'], 1)
    for n in ('rotary', 'below')), strict=True) for x in (r, BASIS(b)) if x.size]),
  'tied': lambda s, a: widen(*s['head']).T @ a['map'], 'tied_exactly': tied_exactly,
  'head_rows': head_rows, 'quantized': quantized, 'uniformly_quantized': multiples,
  'same': lambda s, a: base_of(s)[0].reshape(s['lengths']), 'patched': patched,
  'relative': relative, 'basis': basis, 'subspace': subspace,
}
def expand(kind, s, parts):  # the bit patterns that a leaf stands for
  exact = kind in ('tied_exactly', 'same', 'patched', 'relative', 'basis', 'subspace')
  a = {name: SIGNED(x) if dtype == 'int32' and kind in ('basis', 'subspace')
    else x if exact else widen(x, dtype) for name, (x, dtype) in parts.items()}
  for name in [x for x in a if f'{x}_step' in a]:  # multiples of a step
    a[name] = a[name] * a.pop(f'{name}_step')
  for name in [x for x in a if f'{x}_corner' in a]:  # lower triangles
    corner, below = a.pop(f'{name}_corner'), a[name]
    n, columns = (math.isqrt(8 * corner.size + 1) - 1) // 2, below.shape[1]
    (top := np.tril(np.ones((n, columns))))[top > 0] = corner
    a[name] = np.vstack([top, below])
  array = LEAVES[kind](s, a)
  array = TURN(array.T if s.get('transposed') else array, s)
  return array if exact else narrow(array, s['dtype'])
def read_base(path):  # the bits and dtypes of a safetensors file
  data = pathlib.Path(path).read_bytes()
  start, found, names = 8 + int.from_bytes(data[:8], 'little'), {}, {
    'BF16': 'bfloat16', 'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2',
    'BOOL': 'bool', 'F': 'float', 'U': 'uint', 'I': 'int'}
  for key, x in json.loads(data[8:start]).items():
    if key != '__metadata__':
      dtype = names.get(d := x['dtype']) or names[d[0]] + d[1:]
      bits = 'uint8' if '8_' in dtype else BITS(dtype)
      part = data[start:][slice(*x['data_offsets'])]
      found[key] = np.frombuffer(part, bits).reshape(x['shape']), dtype
  return found
def main(path, output, base=None):
  base = read_base(base) if base else {}
  data, tensors, empty = pathlib.Path(path).read_bytes(), {}, []
  start = 8 + int.from_bytes(data[:8], 'little')
  streams, data = json.loads(data[8:start]), data[start:]
  if streams.pop('__metadata__').get('version') != '1':
    raise ValueError('not a rotbits file of version 1')
  streams = {name: data[slice(*x['data_offsets'])] for name, x in streams.items()}
  manifest = json.loads(zlib.decompress(streams['manifest']))
  # Records with leaves that need others come last.
  needy = lambda record: any('needs' in leaf for leaf in record['leaves'])
  for record in sorted(manifest['records'], key=needy):
    arrays = read_record(record['spec'], streams[record['name']])
    empty += record.get('empty', [])
    for leaf in record['leaves']:
      parts = {name: next(arrays) for name in leaf.get('arrays', [''])}
      bits, dtype = parts.get('', (None, leaf['dtype']))
      if shift := {'int2': 6, 'int4': 4}.get(leaf['dtype']) if '' in parts else 0:
        bits = (bits.view('i1') << shift >> shift).view('u1')  # extends the sign
      if 'type_name' in leaf:
        s = dict(leaf.get('settings', {}), dtype=dtype, head=tensors.get('head/kernel'))
        p = leaf.get('product')
        given = p.get('arrays', []) if p else [leaf['base']] if 'base' in leaf else []
        for own, *_, crc32 in given:
          s['base'] = TURN(base[own][0], s), base[own][1]
          if zlib.crc32(s['base'][0].tobytes()) != crc32:
            raise ValueError(f'{leaf["path"]} needs another base')
        if p:
          bases = [tensors.get(f'subspaces.{i}/basis') for i in p.get('segments', [])]
          bases = [x and np.float64(SIGNED(x[0])) for x in bases]
          own = [widen(*base[x[0]]) for x in given]
          d = manifest['config']['hidden_size']
          s['base'] = product(p, own, bases, dtype, d), dtype
        bits = expand(leaf['type_name'], s, parts).reshape(leaf['shape'])
        if leaf.get('crc32') not in (None, zlib.crc32(TURN(bits, s).tobytes())):
          raise ValueError(f'{leaf["path"]} is damaged')
      tensors[leaf['path']] = bits, dtype
  tensors = {k: x for k, x in tensors.items() if not k.startswith('subspaces.')}
  header, end = {'__metadata__': {'empty': json.dumps(empty)}}, 0
  for path, (bits, dtype) in tensors.items():
    dtype = dtype.replace('loat', '').replace('int', 'i').replace('ui', 'u').upper()
    header[path] = {'dtype': dtype, 'shape': bits.shape}
    header[path]['data_offsets'] = [end, end := end + bits.nbytes]
  text = json.dumps(header).encode()
  body = b''.join(bits.tobytes() for bits, _ in tensors.values())
  pathlib.Path(output).write_bytes(len(text).to_bytes(8, 'little') + text + body)
if __name__ == '__main__':
  main(*sys.argv[1:])
