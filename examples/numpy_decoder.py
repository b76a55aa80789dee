"""A second reader of rotbits files, in plain NumPy, written from docs/format.md alone.

  python examples/numpy_decoder.py FILE OUTPUT.safetensors

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
BITS = lambda dtype: np.dtype(f'u{FLOATS[dtype][0] // 8}' if dtype in FLOATS else dtype)
INFLATE = lambda z, data: (np.frombuffer(z.decompress(data), np.uint8), z.unused_data)
PAD = lambda x, s: np.pad(x, ((0, 0), (0, s['columns'] - len(x))))
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

def normal_table(k, present, kind, dtype, rest, step):  # frequencies [A], class k
  symbol = np.arange(present.size)
  if kind == 'float':
    e, m = symbol >> 3, symbol % 8
    w = np.maximum(e, 1) - (1 << FLOATS[dtype][1] - 1) - 2 + step
    x, c = w - 1, 2 * (m + 8 * (e > 0)) + 1
  else:
    w, x, c = (0, rest - 2, 2 * symbol + 1) if rest else (0, 0, (symbol + 1) // 2)
    x, c = (x, c) if kind == 'int' else (x + step // 4 - 152, c * (4 + step % 4))
  q, s = 8 * x - k, (8 * x - k >> 2) - 12
  square = c**2 * np.array([756388, 899502, 1069694, 1272087])[q % 4]
  bits = 256 * w - (square << np.clip(s, 0, 12) >> np.clip(-s, 0, 62))
  below = bits.max() - bits
  powers = np.floor(2.0 ** (30 - below % 256 / 256)).astype(np.int64)
  weights = np.maximum(1, powers >> np.minimum(below >> 8, 62)) * present
  least = weights.sum() // max(TOTAL - present.sum(), 1) + 1
  ends = np.cumsum(np.maximum(weights, least) * present)
  return np.diff((ends * TOTAL + ends[-1] // 2) // ends[-1], prepend=0)
def read_model(data, shapes, layout):  # each number's table; frequencies [K + 1, A]
  kind, dtype, rest, _ = layout
  part, data = INFLATE(zlib.decompressobj(-15), data)
  take, lines, runs, lattice, end = io.BytesIO(part).read, [], [], None, 0
  read = lambda n, has: np.int64(np.frombuffer(take(n) if has else b'\1' * n, np.uint8))
  heads = np.frombuffer(take(6 * len(shapes)), '<i2').reshape(-1, 3).tolist()
  for i, ((own, base, step), shape) in enumerate(zip(heads, shapes, strict=True)):
    r = read(math.prod(shape[:-1]), own in (2, 4))[:, None]
    c = read(math.prod(shape[-1:]), own in (3, 4))
    runs += [(step, base % step, base, max(r.max() + c.max() - 1, 1), i)] if own else []
    lines.append((own, np.where((r > 0) & (c > 0), r + c - 1, 0).reshape(-1)))
  first, classes, contexts = {}, [], []
  for step, phase, base, top, i in sorted(runs):
    if (step, phase) != lattice or base > end:
      lattice, start, end, origin = (step, phase), base, base, len(classes)
    first[i] = origin + (base - start) // step
    classes += range(end, base + top * step, step)
    end = max(end, base + top * step)
  zero = len(classes)
  classes += [-16384] * any(own and not label.all() for own, label in lines)
  for i, (own, label) in enumerate(lines):
    place = np.where(label > 0, first.get(i, 0) + label - 1, zero)
    contexts.append(place if own else 0 * label + len(classes))
    classes += [] if own else [None]
  part, data = INFLATE(zlib.decompressobj(-15), data)
  count, bits = len(classes), min(8 * BITS(dtype).itemsize - rest, 14)
  size = 1 << (FLOATS[dtype][1] + 3 if kind == 'float' else int(kind[4:] or bits))
  normal = np.unpackbits(part[: CEIL(count, 8)], count=count)
  present = iter(np.unpackbits(part[CEIL(count, 8) :]).reshape(-1, CEIL(size, 8) * 8))
  low, high = np.frombuffer(zlib.decompress(data), np.uint8).reshape(2, -1)
  values = iter((low + 256 * np.int64(high)).tolist())
  # The last table is for places behind the last number: its symbol changes no state.
  frequencies = TOTAL * np.eye(1, size, dtype=np.int64).repeat(count + 1, 0)
  for k, own in enumerate(frequencies[:-1]):
    if not normal[k]:
      own[0], first, last = 0, next(values), next(values)
      own[first : last + 1] = [next(values) for _ in range(first, last + 1)]
    elif (symbols := np.int64(next(present)[:size])).any():
      own[:] = normal_table(classes[k], symbols, *layout)
  return contexts, frequencies

def read_symbols(block, lanes, contexts, table):  # the symbols of a block
  take = io.BytesIO(block).read
  x = np.frombuffer(take(4 * lanes), '<u4').astype(np.uint32)
  least, b = np.frombuffer(take(4), '<u2').tolist()
  sizes = np.frombuffer(take(CEIL(lanes * b, 2) * 2)[: lanes * b], f'<u{b}')
  ends = np.cumsum(sizes + np.int64(least))
  place = np.concatenate([[0], ends[:-1]])
  words = np.frombuffer(take() + bytes(2), '<u2').astype(np.uint32)
  owners = np.array([np.repeat(np.arange(f.size), f) for f in table])
  starts, table = np.uint32(np.cumsum(table, 1) - table), np.uint32(table)
  places = np.append(contexts, np.full(-contexts.size % lanes, len(owners) - 1))
  found = np.empty((places.size // lanes, lanes), np.uint64)
  for t, context in enumerate(places.reshape(-1, lanes)):
    slot = x & (TOTAL - 1)
    symbol = found[t] = owners[context, slot]
    x = table[context, symbol] * (x >> 14) + slot - starts[context, symbol]
    dry = (x < 1 << 16) & (place < ends)
    x = np.where(dry, x << 16 | words[place], x)
    place += dry
  return found.reshape(-1)[: contexts.size]
def with_rests(symbols, take, lanes, kind, dtype, rest, step):  # bit patterns
  rests, shift = np.zeros(symbols.size, np.uint64), 0
  for b in (8,) * (rest // 8) + tuple(b for b in (4, 2, 1) if rest & b):
    width = lanes if b < 8 else 1
    size = CEIL(CEIL(symbols.size, width) * b, 8) * width
    plane = np.frombuffer(take(size), np.uint8).reshape(-1, 1, width)
    plane = plane >> np.arange(0, 8, b, dtype=np.uint8)[:, None] & (1 << b) - 1
    rests |= plane.reshape(-1)[: symbols.size].astype(np.uint64) << shift
    shift += b
  if kind == 'float':
    width, e, m = FLOATS[dtype]
    rests = rests << m - 2 - rest
    large = symbols << m - 3 | rests & (1 << m - 3) - 1
    small = np.ldexp(np.where(large >> m, 0.0, large), step + 2 - m - (1 << e - 1))
    large = np.where(large >> m, large + (step << m), 0)
    return rests >> m - 3 << width - 1 | large | narrow(small, dtype)
  u = symbols << rest | rests
  n = u if kind == 'int' and dtype[0] == 'u' else u >> 1 ^ 0 - (u & 1)
  if kind == 'int':
    return n
  return narrow(np.ldexp(n.view(np.int64) * (4.0 + step % 4), step // 4 - 152), dtype)

def order_groups(distinct):  # returns the places, s and k of each group of an order
  for places in (range(i, min(i + 256, distinct)) for i in range(1, distinct, 256)):
    radix = math.prod(i + 1 for i in places)
    size = CEIL(radix.bit_length(), 8) + 2
    kept = (((1 << 8 * size) - 1) // radix).bit_length()
    yield places, size, CEIL(kept, 8)
def missing_noise(lines, take):  # the bytes that chose the order of these lines
  count, noise = len(lines), b''
  ranks = {line: i for i, line in enumerate(sorted(lines))}
  v, where, digits = list(range(count)), list(range(count)), [0] * count
  for i in range(count - 1, 0, -1):
    j = digits[i] = where[ranks[lines[i]]]
    v[i], v[j], where[v[i]], where[v[j]] = v[j], v[i], i, j
  for places, size, kept in order_groups(count):
    value = int.from_bytes(take(kept), 'little')
    for i in reversed(places):
      value = value * (i + 1) + digits[i]
    noise += value.to_bytes(size, 'little')
  return noise
def read_record(coder, stream):  # returns the arrays of a record, with their dtypes
  take, specs, models, parts = io.BytesIO(stream).read, coder['arrays'], [], []
  axes, distinct = coder['order'] or ([], 0)
  moved, groups = {i for i, _ in axes}, iter(coder['groups'])
  for number, (kind, rest, step, nbytes) in enumerate(coder['layouts']):
    own = [i for i, spec in enumerate(specs) if spec[2] == number]
    layout = kind, specs[own[0]][0], rest, step
    tables, table = read_model(take(nbytes), [specs[i][1] for i in own], layout)
    models.append((layout, dict(zip(own, tables, strict=True)), table))
  for layout, tables, table in models:
    for last in (False, True):
      if members := [i for i in tables if (i in moved) == last]:
        lanes, n, sizes = next(groups)
        x = np.concatenate([tables[i] for i in members])
        own = zip(sizes, np.split(x, range(n, x.size, n)), strict=True)
        blocks = [read_symbols(take(size), lanes, x, table) for size, x in own]
        parts.append((last, members, layout, lanes, blocks))
  parts += [(i in moved, [i], 0, 0, 0) for i, x in enumerate(specs) if x[2] is None]
  left = io.BytesIO(take(sum(kept for *_, kept in order_groups(distinct))))
  noise, arrays = take(), [None] * len(specs)
  def assemble(missing):
    take = io.BytesIO(missing + noise).read
    for _, members, layout, lanes, blocks in sorted(parts, key=lambda part: part[0]):
      dtype, shape = BITS(specs[members[0]][0]), specs[members[0]][1]
      if layout:
        bits = np.concatenate([with_rests(x, take, lanes, *layout) for x in blocks])
      else:
        bits = np.frombuffer(take(math.prod(shape) * dtype.itemsize), dtype)
      for i in members:
        size = math.prod(specs[i][1])
        arrays[i], bits = bits[:size].astype(dtype).reshape(specs[i][1]), bits[size:]
  assemble(bytes(sum(size for _, size, _ in order_groups(distinct))))
  if distinct:
    lines = [np.moveaxis(arrays[i], axis, 0)[:distinct] for i, axis in axes]
    lines = [b''.join(x[i].tobytes() for x in lines) for i in range(distinct)]
    assemble(missing_noise(lines, left.read))
  if [zlib.crc32(x.tobytes()) for x in arrays] != [spec[3] for spec in specs]:
    raise ValueError('an array is damaged')
  return zip(arrays, (spec[0] for spec in specs), strict=True)

def unpack(values, mask):  # a matrix with values where the mask is not 0
  mask[mask > 0] = values
  return mask
def corrected(bits, residuals, exceptions):
  flip = lambda x: x ^ (x >> 8 * x.itemsize - 1 & np.iinfo(x.dtype).max)
  bits = flip(flip(bits.view(f'i{bits.itemsize}')) + residuals).view(exceptions.dtype)
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
def sparse(s, a):
  count = math.prod(s['shape'][:-1] if s['transposed'] else s['shape'][-1:])
  mask = np.unpackbits(a['mask'], 1, count).astype(a['tail'].dtype)
  unpack(np.append(a['values'], a['tail']), mask.T if s['across'] else mask)
  return mask
def levels(s, a):
  base = a.get('base', np.full_like(a['step'], 1 << 31))  # -0 changes no number
  step, base = (x.view(np.float32)[..., None] for x in (a['step'], base))
  numbers = a['index'].reshape(*step.shape[:2], -1) * step + base
  bits = narrow(numbers.reshape(a['index'].shape), s['dtype'])
  return corrected(bits, a['residuals'], a['exceptions']) if 'residuals' in a else bits
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
  'trapezoidal_rows': lambda s, a: np.vstack([a[x] for x in ('full',) if x in a]
    + [a['lower'].T]),
  'reduced_low_rank': lambda s, a:
    np.roll(BASIS(a['below']), -len(a['other']), axis=0) @ a['other'],
  'head_columns': lambda s, a: np.hstack([x for r, b in zip(*(np.split(a.get(n,
    a['below'][:0]) if n in a else np.zeros((0, s['heads'])), s['heads'], 1)
    for n in ('rotary', 'below')), strict=True) for x in (r, BASIS(b)) if x.size]),
  'tied': lambda s, a: widen(*s['head']).T @ a['map'], 'tied_exactly': tied_exactly,
  'table': lambda s, a: np.take_along_axis(a['table'], a['index'], axis=1),
  'head_rows': head_rows, 'sparse': sparse, 'levels': levels,
}
def expand(kind, s, parts):  # the bit patterns that a leaf stands for
  exact = kind in ('tied_exactly', 'sparse', 'levels', 'table')  # made of bit patterns
  a = {name: x if exact else widen(x, dtype) for name, (x, dtype) in parts.items()}
  for name in [x for x in a if f'{x}_corner' in a]:  # lower triangles
    corner, below = a.pop(f'{name}_corner'), a[name]
    n, columns = (math.isqrt(8 * corner.size + 1) - 1) // 2, below.shape[1]
    a[name] = np.vstack([unpack(corner, np.tril(np.ones((n, columns)))), below])
  array = LEAVES[kind](s, a)
  array = array.T if s.get('transposed') else array
  return array if exact else narrow(array, s['dtype'])

def main(path, output):
  data, tensors, empty = pathlib.Path(path).read_bytes(), {}, []
  start = 8 + int.from_bytes(data[:8], 'little')
  streams, data = json.loads(data[8:start]), data[start:]
  if streams.pop('__metadata__').get('version') != '4':
    raise ValueError('not a rotbits file of version 4')
  streams = {name: data[slice(*x['data_offsets'])] for name, x in streams.items()}
  manifest = json.loads(streams['manifest'])
  # Records with leaves that need others come last.
  needy = lambda record: any('needs' in leaf for leaf in record['leaves'])
  for record in sorted(manifest['records'], key=needy):
    arrays = read_record(record['spec'], streams[record['name']])
    empty += record.get('empty', [])
    for leaf in record['leaves']:
      parts = {name: next(arrays) for name in leaf.get('arrays', [''])}
      bits, dtype = parts.get('', (None, leaf['dtype']))
      if 'type_name' in leaf:
        s = leaf.get('settings', {}) | {'dtype': dtype, 'head': tensors.get('head/kernel')}
        bits = expand(leaf['type_name'], s, parts).reshape(leaf['shape'])
        if leaf.get('crc32') not in (None, zlib.crc32(bits.tobytes())):
          raise ValueError(f'{leaf["path"]} is damaged')
      tensors[leaf['path']] = bits, dtype
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
