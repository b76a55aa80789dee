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
TOTAL = 1 << 14
CEIL = lambda a, b: -(-a // b)
BITS = lambda dtype: np.dtype(f'u{FLOATS[dtype][0] // 8}' if dtype in FLOATS else dtype)
INFLATE = lambda z, data: (np.frombuffer(z.decompress(data), np.uint8), z.unused_data)
BASIS = lambda b: np.concatenate([np.eye(b.shape[1]) - b.T @ b / 4, b])

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
    w = 0 * symbol
    x, c = (w + rest - 2, 2 * symbol + 1) if rest else (w, (symbol + 1) // 2)
    x = x + (step - 150) * (kind != 'int')
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
  take, lines, spans, lattice, end = io.BytesIO(part).read, [], [], None, 0
  heads = np.frombuffer(take(6 * len(shapes)), '<i2').reshape(-1, 3).tolist()
  for i, ((own, base, step), shape) in enumerate(zip(heads, shapes, strict=True)):
    labels = [np.ones(math.prod(x), np.int64) for x in (shape[:-1], shape[-1:])]
    for axis in (0, 1):
      if own and (own - 1) >> axis & 1:
        labels[axis][:] = np.frombuffer(take(labels[axis].size), np.uint8)
    label = labels[0][:, None] + labels[1] - 1
    spans += [(step, base % step, base, max(label.max(), 1), i)] if own else []
    label[(labels[0][:, None] == 0) | (labels[1] == 0)] = 0
    lines.append((own, label.reshape(-1)))
  first, classes, contexts = {}, [], []
  for step, phase, base, top, i in sorted(spans):
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
  present = np.unpackbits(part[CEIL(count, 8) :]).reshape(-1, CEIL(size, 8) * 8)
  low, high = np.frombuffer(zlib.decompress(data), np.uint8).reshape(2, -1)
  present, values = iter(present[:, :size].astype(np.int64)), low + 256 * np.int64(high)
  # The last table is for places behind the last number: its symbol changes no state.
  frequencies = TOTAL * np.eye(1, size, dtype=np.int64).repeat(count + 1, 0)
  for k, own in enumerate(frequencies[:-1]):
    if not normal[k]:
      stop = values[1] - values[0] + 3
      own[0], own[values[0] : values[1] + 1] = 0, values[2:stop]
      values = values[stop:]
    elif (symbols := next(present)).any():
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
  rests, shift, steps = np.zeros(symbols.size, np.uint64), 0, CEIL(symbols.size, lanes)
  for b in (8,) * (rest // 8) + tuple(b for b in (4, 2, 1) if rest & b):
    size = symbols.size if b == 8 else CEIL(steps * b, 8) * lanes
    plane = np.frombuffer(take(size), np.uint8)
    if b < 8:
      shifts = np.arange(0, 8, b, dtype=np.uint8)[:, None]
      plane = plane.reshape(-1, 1, lanes) >> shifts & (1 << b) - 1
    rests |= plane.reshape(-1)[: symbols.size].astype(np.uint64) << shift
    shift += b
  if kind == 'float':
    width, exponent, mantissa = FLOATS[dtype]
    rests = rests << mantissa - 2 - rest
    sign, low = rests >> mantissa - 3 << width - 1, rests & (1 << mantissa - 3) - 1
    large = symbols << mantissa - 3 | low
    small = np.where(large >> mantissa, 0, large).astype(np.float64)
    small = np.ldexp(small, step + 2 - (1 << exponent - 1) - mantissa)
    large = np.where(large >> mantissa, large + (step << mantissa), 0)
    return sign | large | narrow(small, dtype)
  u = symbols << rest | rests
  n = u if kind == 'int' and dtype[0] == 'u' else u >> 1 ^ 0 - (u & 1)
  if kind == 'int':
    return n
  return narrow(np.ldexp(n.view(np.int64).astype(np.float64), step - 150), dtype)

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
def read_unit(coder, stream):  # returns the arrays of a unit
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
  return arrays

def tied_exactly(s, a, exceptions, head, dtype):  # the bit patterns of an embedding
  _, exponent, mantissa = FLOATS[dtype]
  m = np.float64(a['map']) * 2 ** s['low'] + a.get('low', 0)
  h = np.rint(np.ldexp(np.float64(head), a['shifts'][:, None]))
  p = np.ldexp(h.T @ m, -s['scale'])
  bits, least = lambda x: np.float64(x).view(np.int64), 2.0 ** (2 - 2 ** (exponent - 1))
  o = bits(np.maximum(abs(p), least)) + (1 << 51 - mantissa) >> 52 - mantissa
  o += np.int64(np.rint(np.minimum(abs(p), least) * (2.0**mantissa / least)))
  o = np.minimum(o - (bits(least) >> 52 - mantissa), 32767)
  count = sum(name.startswith('residuals_') for name in a)
  c = np.clip(o >> mantissa, s['first'], s['first'] + count - 1) - s['first']
  o, off = np.where(p < 0, ~o, o), np.empty_like(o)
  for i in range(count):
    off[c == i] = a[f'residuals_{i}']
  o += off
  table = np.where(o < 0, 0x8000 | ~o, o).astype(np.uint16)
  table[off == -128] = exceptions
  return table
def unpack(values, mask):  # a matrix with values where the mask is not 0
  mask[mask > 0] = values
  return mask
def head_rows(first, others, groups):
  rows = []
  for f, o in zip(np.split(first, groups), np.split(others, groups), strict=True):
    whole = np.hstack([f, *o.reshape(-1, len(f), o.shape[1])])
    rows += [np.hstack([BASIS(whole.T)[: len(f)], f]), o]
  return np.vstack(rows)
def head_planes(below, top, head_dim):
  half = (below.shape[1] // len(top) - top.shape[1]) // 2
  row = np.pad(top, ((0, 0), (2 * half, 0))).reshape(1, -1)
  heads = np.vstack([row, below]).reshape(len(below) + 1, len(top), -1, head_dim)
  squares = (heads[..., : 2 * half] ** 2).sum((0, 2))
  heads[0, :, 0, :half] = 1 - (squares[:, :half] + squares[:, half:]) / 4
  return heads.reshape(len(heads), -1)
LEAVES = {  # the arrays of leaves with settings s and arrays a
  'constant': lambda s, a: np.full(s['shape'], s['value']),
  'trapezoidal': lambda s, a: a['lower'],
  'symmetric_triangle': lambda s, a: a['lower'] + np.tril(a['lower'], -1).T,
  'identity_minus_gram': lambda s, a: np.eye(len(a['b'])) - a['b'] @ a['b'].T
    + a['c'] @ a['c'].T,
  'row_trapezoids': lambda s, a: unpack(a['upper'], np.vstack([np.ones((s['full'],
    s['columns'])), *(np.triu(np.ones((n, s['columns']))) for n in s['blocks'])])),
  'low_rank': lambda s, a: a['u'] @ a['v'],
  'reduced_low_rank': lambda s, a: (lambda x: x.T if s['transposed'] else x)(
    np.roll(BASIS(a['below']), -len(a['other']), axis=0) @ a['other']),
  'head_columns': lambda s, a: np.hstack([x for t, r in zip(*(np.split(a[name],
    s['heads'], axis=1) for name in ('turned', 'rest')), strict=True)
    for x in (t, BASIS(r))]),
  'head_rows': lambda s, a: head_rows(a['first'], a['others'], s['groups']),
  'head_planes': lambda s, a: head_planes(a['below'], a['top'], s['head_dim']),
  'tied': lambda s, a: s['head'].T @ a['map'],
}
def expand(kind, s, a):
  for name in a.keys() & s.keys():  # lower triangles have a setting for their shape
    a[name] = unpack(a[name], np.tril(np.ones(s[name])))
  array = LEAVES[kind](s, a)
  spare = s.get('columns', array.shape[-1]) - array.shape[-1]
  return np.pad(array, ((0, 0), (0, spare))) if spare else array

def main(path, output):
  data, tensors, header, end = pathlib.Path(path).read_bytes(), {}, {}, 0
  start = 8 + int.from_bytes(data[:8], 'little')
  streams = json.loads(data[8:start])
  if streams.pop('__metadata__').get('version') != '3':
    raise ValueError('not a rotbits file of version 3')
  at = lambda x: data[start + x['data_offsets'][0] : start + x['data_offsets'][1]]
  streams = {name: at(x) for name, x in streams.items()}
  units = json.loads(streams['manifest'])['units']
  for unit in sorted(units, key=lambda unit: unit['name'] == 'embed'):  # needs the head
    arrays = iter(read_unit(unit['coder'], streams[unit['name']]))
    dtypes = iter(x[0] for x in unit['coder']['arrays'])
    prefix = f'{unit["name"]}/' if unit['name'].startswith('layers.') else ''
    head = widen(*tensors['head/kernel']) if unit['name'] == 'embed' else None
    for leaf in unit['leaves']:
      kind, dtype, settings = leaf.get('kind'), leaf['dtype'], leaf.get('settings')
      parts = {name: next(arrays) for name in leaf.get('arrays', [''])}
      numbers = {name: widen(x, next(dtypes)) for name, x in parts.items()}
      if not kind:
        bits = parts['']
      elif kind == 'tied_exactly':
        bits = tied_exactly(settings, numbers, parts['exceptions'], head, dtype)
      else:
        bits = narrow(expand(kind, {**settings, 'head': head}, numbers), dtype)
      tensors[prefix + leaf['path']] = bits, dtype
  for path, (bits, dtype) in tensors.items():
    dtype = dtype.replace('loat', '').replace('int', 'i').replace('ui', 'u').upper()
    header[path] = {'dtype': dtype, 'shape': bits.shape}
    header[path]['data_offsets'] = [end, end := end + bits.nbytes]
  text, body = json.dumps(header).encode(), [x.tobytes() for x, _ in tensors.values()]
  body = [len(text).to_bytes(8, 'little'), text, *body]
  pathlib.Path(output).write_bytes(b''.join(body))
if __name__ == '__main__':
  main(*sys.argv[1:])
