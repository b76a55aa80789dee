"""A second reader of rotbits files, in plain NumPy, written from docs/format.md alone.

  python examples/numpy_decoder.py FILE OUTPUT.safetensors

It writes the parameters by their paths in the model. It shares no code with the package;
where the two disagree, the page is wrong. It compares checksums and checks little else:
give it no files from strangers. Arrays are bit patterns, because NumPy has no bfloat16.
"""

import io
import json
import math
import pathlib
import sys
import zlib

import numpy as np

FLOATS = {'float16': (16, 5, 10), 'bfloat16': (16, 8, 7), 'float32': (32, 8, 23)}
TOTAL = 1 << 14


def unsigned(dtype):
  return np.dtype('<u2' if dtype == 'bfloat16' else f'<u{np.dtype(dtype).itemsize}')


def widen(bits, dtype):
  if dtype == 'bfloat16':
    return (bits.astype(np.uint32) << 16).view(np.float32)
  return bits.view(dtype).astype(np.float32 if dtype in FLOATS else dtype)


def narrow(numbers, dtype):
  if dtype == 'bfloat16':
    bits = np.float32(numbers).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
  return np.ascontiguousarray(numbers.astype(dtype)).view(unsigned(dtype))


def inflate(data, wbits):
  unpacker = zlib.decompressobj(wbits)
  return np.frombuffer(unpacker.decompress(data), np.uint8), unpacker.unused_data


def normal_table(k, present, kind, dtype, rest):
  """Returns the frequencies [A] of the normal table of class k."""
  symbol = np.arange(present.size)
  w, x, c = 0 * symbol, 0 * symbol + rest - 2, 2 * symbol + 1
  if kind == 'float':
    e, m = symbol >> 3, symbol % 8
    w = np.maximum(e, 1) - (1 << FLOATS[dtype][1] - 1) - 2
    x, c = w - 1, 2 * (m + 8 * (e > 0)) + 1
  elif not rest:
    x, c = w, (symbol + 1) // 2
  q = 8 * x - k
  s = (q >> 2) - 12
  square = c**2 * np.array([756388, 899502, 1069694, 1272087])[q % 4]
  bits = 256 * w - (square << np.clip(s, 0, 12) >> np.clip(-s, 0, 62))
  below = bits.max() - bits
  powers = np.floor(2.0 ** (30 - np.arange(256) / 256)).astype(np.int64)
  weights = np.maximum(1, powers[below % 256] >> np.minimum(below >> 8, 62)) * present
  least = weights.sum() // max(TOTAL - present.sum(), 1) + 1
  ends = np.cumsum(np.maximum(weights, least) * present)
  return np.diff((ends * TOTAL + ends[-1] // 2) // ends[-1], prepend=0)


def read_model(data, shapes, kind, dtype, rest):
  """Returns the table of each number, for each array; and frequencies [K + 1, A]."""
  part, data = inflate(data, -15)
  take, lines, spans = io.BytesIO(part).read, [], []
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
  first, classes, lattice, end = [0] * len(lines), [], None, 0
  for step, phase, base, top, i in sorted(spans):
    if (step, phase) != lattice or base > end:
      lattice, start, end, origin = (step, phase), base, base, len(classes)
    first[i] = origin + (base - start) // step
    while end < base + top * step:
      classes.append(end)
      end += step
  zero, contexts = len(classes), []
  classes += [-16384] * any(own and not label.all() for own, label in lines)
  for i, (own, label) in enumerate(lines):
    place = np.where(label > 0, first[i] + label - 1, zero)
    contexts.append(place if own else 0 * label + len(classes))
    classes += [] if own else [None]
  part, data = inflate(data, -15)
  count, bits = len(classes), min(8 * unsigned(dtype).itemsize - rest, 14)
  size = 1 << (FLOATS[dtype][1] + 3 if kind == 'float' else bits)
  normal = np.unpackbits(part[: -(-count // 8)], count=count)
  present = np.unpackbits(part[-(-count // 8) :]).reshape(-1, -(-size // 8) * 8)
  low, high = inflate(data, 15)[0].reshape(2, -1).astype(np.int64)
  present, values = iter(present[:, :size].astype(np.int64)), low | high << 8
  # Of a table that is not used, any frequencies will do. The last table is for places
  # behind the last number: its only symbol changes no state.
  frequencies = np.zeros((count + 1, size), np.int64)
  frequencies[:, 0] = TOTAL
  for k, own in enumerate(frequencies[:-1]):
    if not normal[k]:
      stop = values[1] - values[0] + 3
      own[0], own[values[0] : values[1] + 1] = 0, values[2:stop]
      values = values[stop:]
    elif (symbols := next(present)).any():
      own[:] = normal_table(classes[k], symbols, kind, dtype, rest)
  return contexts, frequencies


def read_symbols(block, lanes, contexts, frequencies):
  """Returns the symbols of a block, given the table of each."""
  take = io.BytesIO(block).read
  x = np.frombuffer(take(4 * lanes), '<u4').astype(np.uint32)
  least, b = np.frombuffer(take(4), '<u2').tolist()
  sizes = np.frombuffer(take((lanes * b + 1) // 2 * 2)[: lanes * b], f'<u{b}')
  ends = np.cumsum(sizes + np.int64(least))
  place = np.concatenate([[0], ends[:-1]])
  words = np.frombuffer(take() + bytes(2), '<u2').astype(np.uint32)
  tables, symbols = np.nonzero(frequencies)
  owners = np.repeat(symbols, frequencies[tables, symbols]).reshape(-1, TOTAL)
  starts = (np.cumsum(frequencies, 1) - frequencies).astype(np.uint32)
  frequencies = frequencies.astype(np.uint32)
  places = np.pad(
    contexts, (0, -contexts.size % lanes), constant_values=len(owners) - 1
  )
  found = np.empty((places.size // lanes, lanes), np.uint64)
  for t, context in enumerate(places.reshape(-1, lanes)):
    slot = x & (TOTAL - 1)
    symbol = found[t] = owners[context, slot]
    x = frequencies[context, symbol] * (x >> 14) + slot - starts[context, symbol]
    dry = (x < 1 << 16) & (place < ends)
    x = np.where(dry, x << 16 | words[place], x)
    place += dry
  if x.any() or (place < ends).any():
    raise ValueError('a block is damaged')
  return found.reshape(-1)[: contexts.size]


def with_rests(symbols, take, lanes, kind, dtype, rest):
  """Returns the bit patterns of a block, as uint64."""
  rests, shift, steps = np.zeros(symbols.size, np.uint64), 0, -(-symbols.size // lanes)
  for b in (8,) * (rest // 8) + tuple(b for b in (4, 2, 1) if rest & b):
    size = symbols.size if b == 8 else -(-steps * b // 8) * lanes
    plane = np.frombuffer(take(size), np.uint8)
    if b < 8:
      shifts = np.arange(0, 8, b, dtype=np.uint8)[:, None]
      plane = plane.reshape(-1, 1, lanes) >> shifts & (1 << b) - 1
    rests |= plane.reshape(-1)[: symbols.size].astype(np.uint64) << shift
    shift += b
  if kind == 'float':
    width, _, mantissa = FLOATS[dtype]
    low = mantissa - 3
    rests = rests << low + 1 - rest
    return rests >> low << width - 1 | symbols << low | rests & (1 << low) - 1
  u = symbols << rest | rests
  return u if np.dtype(dtype).kind == 'u' else u >> 1 ^ 0 - (u & 1)


def order_groups(distinct):
  """Returns the places, P, s and k of each group of an order."""
  groups = []
  for start in range(1, distinct, 256):
    places = range(start, min(start + 256, distinct))
    radix = math.prod(i + 1 for i in places)
    size = -(-radix.bit_length() // 8) + 2
    kept = (((1 << 8 * size) - 1) // radix).bit_length()
    groups.append((places, radix, size, -(-kept // 8)))
  return groups


def missing_noise(lines, take):
  """Returns the bytes that chose the order of these lines, which are bytes."""
  count, noise = len(lines), b''
  ranks = {line: i for i, line in enumerate(sorted(lines))}
  v, where, digits = list(range(count)), list(range(count)), [0] * count
  for i in range(count - 1, 0, -1):
    j = digits[i] = where[ranks[lines[i]]]
    v[i], v[j] = v[j], v[i]
    where[v[i]], where[v[j]] = i, j
  for places, radix, size, kept in order_groups(count):
    value = int.from_bytes(take(kept), 'little')
    for i in reversed(places):
      value = value * (i + 1) + digits[i]
    noise += value.to_bytes(size, 'little')
  return noise


def read_unit(coder, stream):
  """Returns the arrays of a unit."""
  take, specs, models = io.BytesIO(stream).read, coder['arrays'], []
  axes, distinct = coder['order'] or ([], 0)
  moved, groups, parts = {i for i, _ in axes}, iter(coder['groups']), []
  for number, (kind, rest, nbytes) in enumerate(coder['layouts']):
    own = [i for i, spec in enumerate(specs) if spec[2] == number]
    layout = kind, specs[own[0]][0], rest
    tables, frequencies = read_model(take(nbytes), [specs[i][1] for i in own], *layout)
    models.append((layout, dict(zip(own, tables, strict=True)), frequencies))
  for layout, tables, frequencies in models:
    for last in (False, True):
      if members := [i for i in tables if (i in moved) == last]:
        lanes, n, sizes = next(groups)
        x = np.concatenate([tables[i] for i in members])
        own = zip(sizes, np.split(x, range(n, x.size, n)), strict=True)
        blocks = [read_symbols(take(size), lanes, x, frequencies) for size, x in own]
        parts.append((last, members, layout, lanes, blocks))
  raw = [i for i, spec in enumerate(specs) if spec[2] is None]
  parts += [(i in moved, [i], None, 0, []) for i in raw]
  left = take(sum(kept for *_, kept in order_groups(distinct)))
  noise, arrays = take(), [None] * len(specs)

  def assemble(take):
    for _, members, layout, lanes, blocks in sorted(parts, key=lambda part: part[0]):
      dtype, shape, *_ = specs[members[0]]
      dtype = unsigned(dtype)
      if layout:
        bits = np.concatenate([with_rests(x, take, lanes, *layout) for x in blocks])
      else:
        bits = np.frombuffer(take(math.prod(shape) * dtype.itemsize), dtype)
      for i in members:
        size = math.prod(specs[i][1])
        arrays[i], bits = bits[:size].astype(dtype).reshape(specs[i][1]), bits[size:]

  assemble(io.BytesIO(bytes(sum(x[2] for x in order_groups(distinct))) + noise).read)
  if distinct:
    lines = [np.moveaxis(arrays[i], axis, 0)[:distinct] for i, axis in axes]
    lines = [
      np.ascontiguousarray(x).reshape(distinct, -1).view(np.uint8) for x in lines
    ]
    lines = [line.tobytes() for line in np.concatenate(lines, axis=1)]
    assemble(io.BytesIO(missing_noise(lines, io.BytesIO(left).read) + noise).read)
  if [zlib.crc32(x.tobytes()) for x in arrays] != [spec[3] for spec in specs]:
    raise ValueError('an array is damaged')
  return arrays


def tied_exactly(s, a, exceptions, head, dtype):
  """Returns the bit patterns of an embedding."""
  _, exponent, mantissa = FLOATS[dtype]
  m = np.float64(a['map']) * 2 ** s['low'] + a.get('low', 0)
  h = np.rint(np.ldexp(np.float64(head), a['shifts'][:, None]))
  p = np.ldexp(h.T @ m, -s['scale'])
  bits, least = lambda x: np.float64(x).view(np.int64), 2.0 ** (2 - 2 ** (exponent - 1))
  o = bits(np.maximum(abs(p), least)) + (1 << 51 - mantissa) >> 52 - mantissa
  o += np.rint(np.minimum(abs(p), least) * (2.0**mantissa / least)).astype(np.int64)
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


def expand(kind, s, a, tensors):
  """Returns the array of a leaf with settings s and arrays a."""
  basis = lambda b: np.concatenate([np.eye(b.shape[1]) - b.T @ b / 4, b])
  widened = lambda x: np.pad(x, ((0, 0), (0, s['columns'] - len(x))))

  def lower(name):
    matrix = np.tril(np.ones(s[name], np.float32))
    matrix[matrix > 0] = a[name]
    return matrix

  if kind == 'constant':
    return np.full(s['shape'], s['value'])
  if kind == 'trapezoidal':
    return lower('lower')
  if kind == 'row_trapezoids':
    rows = [np.triu(np.ones((n, s['columns']))) for n in s['blocks']]
    matrix = np.concatenate([np.ones((s['full'], s['columns'])), *rows])
    matrix[matrix > 0] = a['upper']
    return matrix
  if kind == 'symmetric_triangle':
    return widened(lower('lower') + np.tril(lower('lower'), -1).T)
  if kind == 'identity_minus_gram':
    b, c = lower('b'), lower('c')
    return widened(np.eye(len(b)) - b @ b.T + c @ c.T)
  if kind == 'low_rank':
    return a['u'] @ a['v']
  if kind == 'reduced_low_rank':
    product = np.roll(basis(a['below']), -len(a['other']), axis=0) @ a['other']
    return product.T if s['transposed'] else product
  if kind == 'head_columns':
    parts = (np.split(a[name], s['heads'], axis=1) for name in ('turned', 'rest'))
    return np.hstack([x for t, r in zip(*parts, strict=True) for x in (t, basis(r))])
  if kind == 'head_rows':
    rows, parts = [], (np.split(a[name], s['groups']) for name in ('first', 'others'))
    for f, o in zip(*parts, strict=True):
      whole = np.hstack([f, *o.reshape(-1, *f.shape[:1], o.shape[1])])
      rows += [np.hstack([basis(whole.T)[: len(f)], f]), o]
    return np.vstack(rows)
  if kind == 'head_planes':
    below, top = a['below'], a['top']
    half = (below.shape[1] // len(top) - top.shape[1]) // 2
    row = np.pad(top, ((0, 0), (2 * half, 0))).reshape(1, -1)
    heads = np.vstack([row, below]).reshape(len(below) + 1, len(top), -1, s['head_dim'])
    squares = (heads[..., : 2 * half] ** 2).sum((0, 2))
    heads[0, :, 0, :half] = 1 - (squares[:, :half] + squares[:, half:]) / 4
    return heads.reshape(len(heads), -1)
  if kind == 'tied':
    return widen(*tensors['head/kernel']).T @ a['map']
  raise ValueError(f'a leaf of unknown kind {kind}')


def main(path, output):
  data, tensors, header, end = pathlib.Path(path).read_bytes(), {}, {}, 0
  start = 8 + int.from_bytes(data[:8], 'little')
  streams = json.loads(data[8:start])
  if streams.pop('__metadata__').get('version') != '3':
    raise ValueError('not a rotbits file of version 3')
  for name, stream in streams.items():
    begin, stop = stream['data_offsets']
    streams[name] = data[start + begin : start + stop]
  units = json.loads(streams['manifest'])['units']
  for unit in sorted(units, key=lambda unit: unit['name'] == 'embed'):  # needs the head
    arrays = iter(read_unit(unit['coder'], streams[unit['name']]))
    dtypes = iter(x[0] for x in unit['coder']['arrays'])
    prefix = f'{unit["name"]}/' if unit['name'].startswith('layers.') else ''
    for leaf in unit['leaves']:
      kind, dtype, settings = leaf.get('kind'), leaf['dtype'], leaf.get('settings')
      parts = {name: next(arrays) for name in leaf.get('arrays', [''])}
      numbers = {name: widen(x, next(dtypes)) for name, x in parts.items()}
      if not kind:
        bits = parts['']
      elif kind == 'tied_exactly':
        head = widen(*tensors['head/kernel'])
        bits = tied_exactly(settings, numbers, parts['exceptions'], head, dtype)
      else:
        bits = narrow(expand(kind, settings, numbers, tensors), dtype)
      tensors[prefix + leaf['path']] = bits, dtype
  for path, (bits, dtype) in tensors.items():
    for long, short in (('bfloat', 'BF'), ('float', 'F'), ('uint', 'U'), ('int', 'I')):
      dtype = dtype.replace(long, short)
    header[path] = {'dtype': dtype.upper(), 'shape': bits.shape}
    header[path]['data_offsets'] = [end, end + bits.nbytes]
    end += bits.nbytes
  text = json.dumps(header).encode()
  parts = [len(text).to_bytes(8, 'little'), text]
  parts += [bits.tobytes() for bits, _ in tensors.values()]
  pathlib.Path(output).write_bytes(b''.join(parts))


if __name__ == '__main__':
  main(*sys.argv[1:])
