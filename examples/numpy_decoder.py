"""A second reader of rotbits files, in NumPy, from docs/format*.md alone.

  python examples/numpy_decoder.py FILE OUTPUT.safetensors [BASE.safetensors]

It writes parameters by their paths. Files must be trusted: it checks their CRCs alone.
"""

import io
import json
import math
import sys
import zlib

from ml_dtypes import finfo  # which makes its dtypes known to NumPy
import numpy as np
from safetensors import numpy as safetensors_numpy


def stream(data):
  """A function that takes the next n elements of some bytes, or all if n is -1."""
  read = io.BytesIO(data).read
  return lambda n, dtype='u1': np.frombuffer(read(n * np.dtype(dtype).itemsize), dtype)


def read_block(take, told, frequencies, pops, r, dtype):
  """The symbols of units, their raw bits, which are listed whole, and those elements.

  `told` has the tables of the symbols of units and perhaps the shifts of both elements.
  """
  count, escape = told.shape[1], frequencies.shape[1] - 1
  lanes, width = 4 if count <= 1 << 16 else 32, escape.bit_length()
  told = np.pad(told, [(0, 0), (0, -count % lanes)], 'edge')
  told = told.reshape(len(told), -1, lanes)
  x, tops = np.int64(take(lanes, '<u4')), np.int64(take(lanes, '<u2')).cumsum()
  words = np.append(take(tops[-1], '<u2'), 0)  # a lane without words looks at the next
  owners = np.array([np.repeat(np.arange(f.size), f) for f in frequencies])
  starts, total = np.cumsum(frequencies, 1) - frequencies, owners.shape[1]
  symbols = np.zeros((*told[0].shape, pops), np.int64)
  raw, lows = np.zeros((*told[0].shape, 2), np.int64), range(0, r, 8)
  for i, row in enumerate(zip(*told, strict=True)):
    tables, shifts = row[:pops], row[pops:]
    pieces = [None, *lows] if shifts else [None] * pops  # None is a symbol
    for j, low in enumerate(pieces):
      if low is None:
        table, slot = tables[j], x % total
        symbols[i, :, j] = symbol = owners[table, slot]
        x = frequencies[table, symbol] * (x // total) + slot - starts[table, symbol]
      else:
        first, second = np.clip(np.array(shifts) - low, 0, 8)
        raw[i, :, 0] |= (x >> second) % (1 << first) << low
        raw[i, :, 1] |= x % (1 << second) << low
        x >>= first + second
      tops = tops - (x < 1 << 16)
      x = np.where(x < 1 << 16, x << 16 | words[tops], x)
  symbols, raw, low = symbols.reshape(-1, pops)[:count], raw.reshape(-1, 2)[:count], 0
  for b in [] if shifts else [8] * (r // 8) + [b for b in (4, 2, 1) if r & b]:
    plane = take(math.ceil(len(told[0]) * b / 4) * lanes)  # of 4 // b rows a byte
    bits = np.unpackbits(plane, bitorder='little').reshape(-1, lanes, 4 // b or 1, 2, b)
    raw |= bits.swapaxes(1, 2).reshape(-1, 2, b)[: len(raw)] @ (1 << low + np.arange(b))
    low += b
  is_whole = (symbols == escape).any(1)
  if pops == 1:
    size = width * np.count_nonzero(is_whole)
    listed = np.unpackbits(take(math.ceil(size / 8)), count=size).reshape(-1, width)
    symbols[is_whole, 0] = listed @ (1 << np.arange(width)[::-1])
    is_whole = symbols[:, 0] == 1023
  return symbols, raw, is_whole, take(2 * np.count_nonzero(is_whole), dtype)


def joined(symbols, raw, shifts, told, group, dtype):
  """The bit patterns of units, given offsets; or given shifts and known elements."""
  (kind, r, *_), bins = group, symbols
  if kind == 'bytes':
    return symbols - 30
  if symbols.shape[1] == 1:
    bins = np.hstack(np.divmod(symbols, 32))
  if kind == 'codes':
    return (bins + told << r | raw) ^ 128
  sign = 1 << 8 * dtype.itemsize - 1
  if shifts.size:  # of differences
    difference, size = (bins >> 1 ^ -(bins & 1)) << shifts.T | raw, told % sign
    if dtype.kind == 'i':
      return told + difference
    least = size - np.minimum(size, 4 << finfo(dtype).nmant)
    place = (difference + size + sign) % (2 * sign) - sign
    gap = np.where(place < 2 * least - sign, least - sign, 2 * least)
    place = np.where(place < least, place - gap, place)
    return place ^ (place & sign > 0) * (sign - 1) ^ told & sign
  m, t = finfo(dtype).nmant, 2 if kind == 'raised' else 1
  tail = r - (kind != 'positive')  # raw bits of an element without its sign
  bits = bins + told * (t == 1) << m - t | raw % (1 << tail) << m - t - tail
  if t == 2:  # small elements share a step
    small = np.ldexp(bits % (1 << m) * 1.0, told - 1 + finfo(dtype).minexp - m)
    small = small.astype(dtype).view(f'u{dtype.itemsize}')
    bits = np.where(bits >> m, bits + (told - 1 << m), small)
  return bits | (raw >> tail) * sign


def read_group(group, data, parts, known):
  """Reads the parts of a group; `known` returns the known bits of one."""
  (kind, r, nbytes, sizes), dtype = group, parts[0].dtype
  take = stream(zlib.decompress(data(nbytes), -15))
  several = {'floats': (14, 4, 2, 2), 'codes': (13, 16, 1, 2), 'raised': (12, 32, 1, 2)}
  several |= dict.fromkeys(('singles', 'positive'), (12, 4, 2, 1))
  p, levels, step, shared = several.get(kind, (12, 256, 1, 1))
  pops = 2 if kind in ('singles', 'positive') else 1
  unit, size = 1 if kind == 'bytes' else 2, 255 if kind == 'bytes' or pops > 1 else 32
  pad = lambda x: np.pad(x.ravel(), (0, x.size % unit), 'edge')
  units = lambda several: np.int64(np.hstack([*map(pad, several)])).reshape(-1, unit).T
  base, heads, classes = take(1, '<i2'), take(2 * len(parts)).reshape(-1, 2), []
  for (mode, least), part in zip(heads, parts, strict=True):
    *rows, columns = part.shape if part.ndim != 1 else (math.ceil(part.size / 128), 128)
    if mode & 4 and part.ndim > 1:  # rows are along the first axis
      rows, columns = part.shape[:1], math.prod(part.shape[1:])
    width = 1 if columns % shared else shared  # columns of a scale
    k = np.full((math.prod(rows), columns), least)  # of 8 bits: sums are modulo 256
    k += take(len(k))[:, None] if mode & 1 else 0
    k += take(columns // width).repeat(width) if mode & 2 else 0
    classes.append(k.ravel()[: part.size])
  k, stored = units(classes), np.cumsum(take(levels), dtype=np.int64) - 1
  frequencies = np.int64([1, 256] @ take(-1).reshape(2, -1)).reshape(-1, size)
  if kind in ('integers', 'known'):
    several = map(known if kind == 'known' else np.zeros_like, parts)
    told, exponents = units(x.view(f'u{x.itemsize}') for x in several), 0
    if dtype.kind != 'i':
      exponents = (told % (1 << 8 * dtype.itemsize - 1) >> finfo(dtype).nmant).clip(1)
    level = np.clip(k + base - 4 * exponents, 0, 255)
    shifts = np.clip(level - 64 >> 2, 0, r)
    tables, second = stored[level - 4 * shifts]
  else:
    k = k[:pops]
    told, shifts = k // levels * step + base, k[:0]
    tables = second = stored[k % levels] if pops > 1 else stored[k[0] % levels]
  if unit == 2 and pops == 1:  # a table for each two that a unit has
    used, tables = np.unique(np.stack([tables, second]), axis=1, return_inverse=True)
    weights = frequencies[used[0], :, None] * frequencies[used[1], None]
    frequencies = weights.reshape(len(weights), -1)[:, :-1] + (1 << 27 - p) >> 28 - p
  frequencies = np.column_stack([frequencies, (1 << p) - frequencies.sum(1)])
  starts = np.arange(1, len(sizes)) * -(-tables.shape[-1] // 32) // len(sizes)
  spans = np.split(np.vstack([tables, shifts]), 32 * starts, 1)
  form = frequencies, pops, r, f'u{dtype.itemsize}'
  blocks = [read_block(data, x, *form) for x in spans]
  symbols, raw, is_whole, whole = map(np.concatenate, zip(*blocks, strict=True))
  bits = joined(symbols, raw, shifts, told.T, group, dtype).astype(whole.dtype)
  bits[is_whole] = whole.reshape(-1, unit)
  ends = np.cumsum([math.ceil(part.size / unit) for part in parts])[:-1]
  for part, numbers in zip(parts, np.split(bits, ends), strict=True):
    part.view(bits.dtype)[...] = numbers.ravel()[: part.size].reshape(part.shape)


def read_record(record, data, tensors, base, config):
  """Adds the arrays of the leaves of a record to the tensors by path."""
  spec, take = record['spec'], stream(data)
  arrays = [np.empty(shape, dtype) for dtype, shape, *_ in spec['arrays']]
  several, members, parts_of = iter(arrays), [], []
  named = lambda leaf: {name: next(several) for name in leaf.get('arrays', [''])}
  leaves = [(leaf, named(leaf)) for leaf in record['leaves']]
  for array, (_, _, crc32, groups, m) in zip(arrays, spec['arrays'], strict=True):
    parts = [array]
    if len(groups) > 1:  # a mask, the other elements, and perhaps the signs of zeros
      whole = np.zeros(array.shape, bool).reshape(-1, array.shape[-1])
      mask = np.packbits(whole, axis=1)
      signs = np.packbits(np.zeros(array.size - m, bool))
      parts = [mask, np.empty(m, array.dtype), signs]
    elif array.itemsize == 8 or array.dtype.kind == 'u':
      parts = [array.reshape(-1, 1).view('u1')]
    parts_of.append((array, crc32, parts))
    members += zip(groups, parts, strict=False)  # perhaps all but the signs
  owner = lambda part: next(x for x in leaves if x[1].get('elements') is part)
  known = lambda part: np.extract(*predicted(*owner(part), tensors, base, config))
  for part in [part for i, part in members if i is None]:
    part[...] = take(part.size, part.dtype).reshape(part.shape)
  for i, group in enumerate(spec['groups']):
    read_group(group, take, [part for j, part in members if j == i], known)
  for array, crc32, parts in parts_of:
    if len(parts) > 1:
      mask, values, signs = parts
      bits = array.view(f'u{array.itemsize}').reshape(len(mask), -1)
      is_set = np.unpackbits(mask, axis=1, count=bits.shape[1]) > 0
      negative = np.unpackbits(signs, count=np.count_nonzero(~is_set))
      bits[~is_set] = negative.astype(bits.dtype) << 8 * array.itemsize - 1
      bits[is_set] = values.view(bits.dtype)
    assert zlib.crc32(array.tobytes()) == crc32, 'an array is damaged'
  for leaf, a in leaves:
    tensors[leaf['path']] = read_leaf(leaf, a, tensors, base, config)


def product(p, dtype, tensors, base, hidden):
  """A product with tensors of the dense model, in float32."""
  kind, size = p['kind'], 26 - (hidden.bit_length() + 1) // 2
  rounded = lambda x: np.float64(np.float32(x).astype(dtype)) if p.get('rounded') else x
  power = lambda x, size=size: size - np.frexp(abs(x).max(-1, keepdims=True))[1]
  integers = lambda x, power: np.rint(np.ldexp(x, power))
  bases = [tensors[f'subspaces.{i}/basis'].T * 2.0**-25 for i in p.get('segments', [])]
  arrays = [rounded(np.float64(base[path])) for path, *_ in p.get('arrays', [])]
  x, *others = bases[:-1] + arrays
  x = x.T if kind in ('reads', 'bias') and not p.get('transposed') else x
  x = rounded(x * others[0]) if kind == 'reads' else x
  if p.get('centred'):
    r = power(x, 52 - (hidden - 1).bit_length())
    i = integers(x, r)
    x = rounded(np.ldexp(i - i.sum(-1, keepdims=True) / hidden, -r))
  columns = others[0][None] if kind == 'bias' else bases[-1]
  q, r = power(x), power(columns)
  x = np.ldexp(integers(x, q) @ integers(columns, r).T, -q - r.T)
  x = x[:, 0] + sum(others[1:]) if kind == 'bias' else x
  return np.float32(x.T if kind == 'reads' else x)


def predicted(leaf, a, tensors, base, config):
  """Which elements of an array differ from known ones, and the bits of these."""
  dtype, n, s = np.dtype(leaf['dtype']), math.prod(leaf['shape']), leaf['settings']
  if 'map' in a:  # a product of integers of 16 bits, but not of their low bytes
    several = np.float64(tensors['head/kernel']), np.float64(a['map'])
    e, f = (np.frexp(abs(x).max(0) * 128 / 127)[1].clip(-35) for x in several)
    h, t = (np.rint(np.ldexp(x, 15 - y)) for x, y in zip(several, (e, f), strict=True))
    low = lambda x: (x + 128) % 256 - 128
    sums = np.int64((h.T @ t - low(h).T @ low(t)) / 256).astype('i4').astype('f4')
    known = np.ldexp(sums, e[:, None] + f - 22 - s.get('scale', 0))
  elif 'product' in leaf:
    known = product(leaf['product'], dtype, tensors, base, config['hidden_size'])
  else:
    known = base[leaf['base'][0]]
  b = np.ravel(known.astype(dtype, order='C'))[:n].view(f'i{dtype.itemsize}')
  b = np.pad(b, (0, n - b.size))
  if 'left' in a:
    x, p = np.float64(b.view(dtype)), np.float64(a['left']) @ a['right']
    near = np.float32(x + np.ldexp(p, s.get('unit', 0)).ravel()).astype(dtype)
    b = np.where(np.isfinite(x), near.view(b.dtype), b)
  if 'drift' in a:
    m, e = finfo(dtype).nmant, (1 << finfo(dtype).nexp) - 1
    drift = a['drift'][b % (1 << m) >> max(m - 8, 0)].astype(b.dtype)
    b = b + drift * ((b >> m & e) % e > 0)
  differs = np.unpackbits(a.get('changed', np.uint8([255])), bitorder='little') > 0
  return np.resize(np.repeat(differs, 65536), n), b


def read_leaf(leaf, arrays, tensors, base, config):
  """The array of a leaf."""
  kind, s, a = leaf.get('type_name'), leaf.get('settings', {}), arrays
  if kind not in (None, 'difference', 'block_quantized', 'basis'):
    a = {k: np.float32(x) * arrays.get(f'{k}_step', 1) for k, x in arrays.items()}
  for name in [k for k in a if f'{k}_corner' in a]:  # triangles
    top = np.tri(math.isqrt(2 * a[f'{name}_corner'].size), a[name].shape[1])
    top[top > 0] = a[f'{name}_corner']
    a[name] = np.vstack([top, a[name]])
  gram = lambda b: np.vstack([np.eye(b.shape[1]) - b.T @ b / 4, b])
  match kind:
    case None:
      is_packed = leaf['dtype'] in ('int2', 'int4')
      return a[''].astype(leaf['dtype']).astype('i1') if is_packed else a['']
    case 'difference':
      differs, array = predicted(leaf, a, tensors, base, config)
      array[differs] = a.get('elements', array[differs]).view(array.dtype).ravel()
      array = array.view(leaf['dtype'])
    case 'block_quantized':
      floats = lambda x, form: (np.uint32(x) + form[0] << form[1]).view('f4')
      scales = floats(a['scales'], s.get('scale_form', (0, 0))) * a.get('factor', 1)
      array = a['numbers'].astype('f4').reshape(-1, a['numbers'].shape[-1])
      blocks = zip(array.shape, s['block'], strict=True)
      places = np.ix_(*(np.arange(n) // m for n, m in blocks))
      array = np.copysign(array + (array < 0) * s.get('ones_complement', 0), array)
      array /= 2 if s['grid'] == 'float4_e2m1fn' else 1
      array *= scales[places]
      if 'minima' in a:
        array += floats(a['minima'], s.get('minimum_form', (0, 0)))[places]
      array = array.astype(s['name']).ravel()
      array[np.cumsum(np.int64(a.get('gaps', [])) + 1) - 1] = a.get('exceptions', 0)
    case 'basis':
      array = np.float64(a['numbers']) * s['step']
      if 'mask' in a:
        rounded = lambda x: np.rint(x * 2.0**25) / 2.0**25
        x, (m, d) = array / 2.0**25, array.shape
        g, z = np.eye(m) + rounded(x @ x.T), rounded(np.eye(m) * 2 / 3)
        for _ in range(5):
          z = rounded(z @ (2 * np.eye(m) - rounded(g @ z)))
        low = 2 * rounded(z @ x)
        rows = np.vstack([np.eye(d) - rounded(x.T @ low), low]) * 2.0**25
        is_top = np.unpackbits(a['mask'], count=m + d, bitorder='little') > 0
        array = rows[np.argsort(np.argsort(~is_top, stable=True))]
    case 'constant':
      array = np.full(leaf['shape'], a['value'])
    case 'identity_minus_gram':
      square = np.eye(len(a['b'])) - a['b'] @ a['b'].T + a['c'] @ a['c'].T
      array = np.pad(square, ((0, 0), (0, s['columns'] - len(square))))
    case 'trapezoidal_rows':
      order = np.argsort(1 - a.get('pivots', np.ones(len(a['lower']))), stable=True)
      array = np.vstack([*a.get('full', []), *a['lower'].T[:, np.argsort(order)]])
    case 'head_bases':
      bases = [gram(b) for b in np.split(a['below'], s['heads'], 1)]
      rotary = np.split(a.get('rotary', bases[0][:, :0]), s['heads'], 1)
      array = np.hstack([x for pair in zip(rotary, bases, strict=True) for x in pair])
      if 'group' in s:
        array = np.vstack([x.T for b in bases for x in np.split(b, s['group'])])
    case 'tied':
      array = np.float32(tensors['head/kernel']).T @ a['map']
    case 'uniformly_quantized':
      factor = lambda e: np.ldexp(4 + e % 4, np.int32(e // 4 - 2))
      rows, columns = (factor(a.get(f'{x}_exponents', 0)) for x in ('row', 'column'))
      array = a['integers'] * a['step'] * rows[..., None] * columns
  array = array.astype(leaf['dtype']).reshape(leaf['shape'])
  assert leaf.get('crc32') in (None, zlib.crc32(array.tobytes())), 'a leaf is damaged'
  return array


def main(path, output, base=None):
  """Writes the parameters of a file by their paths."""
  base = safetensors_numpy.load_file(base) if base else {}
  streams = safetensors_numpy.load_file(path)  # one per record, and the manifest
  manifest = json.loads(zlib.decompress(streams['manifest']))
  config, tensors, empty = manifest.get('config'), {}, []
  for record in manifest['records']:
    read_record(record, streams[record['name']], tensors, base, config)
    empty += record.get('empty', [])
  tensors = {k: x.copy() for k, x in tensors.items() if not k.startswith('subspaces.')}
  safetensors_numpy.save_file(tensors, output, {'empty': json.dumps(empty)})


if __name__ == '__main__':
  main(*sys.argv[1:])
