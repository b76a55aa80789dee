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

PAIRS = 'floats', 'raised', 'codes'


def read_message(data, tables, shifts, frequencies, p):
  """The symbols with the raw bits of integers, and the bytes behind the message."""
  words, start = np.frombuffer(data, '<u2', len(data) // 2), 2 + 3 * tables.shape[1]
  low, high, sizes = np.int64(words[2:start]).reshape(3, -1)
  tops = start + np.cumsum(sizes + (words[:2] @ [1, 1 << 16]))
  x, end = low + (high << 16), tops[-1]
  words = np.append(words, 0)  # lanes without words look at the next one, too

  def pop(p, start, frequency):
    nonlocal x, tops
    x = frequency * (x >> p) + x % (1 << p) - start
    tops = tops - (x < 1 << 16)
    x = np.where(x < 1 << 16, x << 16 | words[tops], x)

  owners = np.array([np.repeat(np.arange(f.size), f) for f in frequencies])
  starts = np.cumsum(frequencies, 1) - frequencies
  symbols = np.empty(tables.shape, np.int64)
  for i, (table, shift) in enumerate(zip(tables, shifts, strict=True)):
    symbol = owners[table, x % (1 << p)]
    pop(p, starts[table, symbol], frequencies[table, symbol])
    while shift.any():
      size = np.minimum(shift, 16)
      raw = x % (1 << size)
      pop(size, raw, 1)
      symbol, shift = symbol << size | raw, shift - size
    symbols[i] = symbol
  return symbols.ravel(), np.frombuffer(data, 'u1', -1, 2 * end)


def read_block(data, tables, told, frequencies, group, dtype):
  """The bits of the elements of each unit."""
  kind, r, *_ = group
  is_pair, raised = kind in PAIRS, kind == 'raised'
  count, unsigned, t = tables.size, f'u{dtype.itemsize}', 1 + raised
  p, lanes = 14 if kind == 'floats' else 12, 4 if count <= 1 << 16 else 32
  pad = lambda x: np.pad(x, (0, -count % lanes), 'edge').reshape(-1, lanes)
  shifts = pad(0 * told if is_pair else told)
  tables = pad(tables)
  symbols, data = read_message(data, tables, shifts, frequencies, p)
  told = pad(told).reshape(-1, 1)
  bits = symbols[:, None] - ((128 if dtype.kind == 'i' else 30) << told)
  if is_pair:
    planes = [np.zeros((symbols.size, 2, 0), 'u1')]
    for b in [8] * (r // 8) + [b for b in (4, 2, 1) if r & b]:
      size = math.ceil(symbols.size // lanes * b / 4) * lanes
      plane, data = np.unpackbits(data[:size], bitorder='little'), data[size:]
      plane = plane.reshape(-1, lanes, max(4 // b, 1), 2, b).swapaxes(1, 2)
      planes.append(plane.reshape(-1, 2, b)[: symbols.size])
    raw = np.concatenate(planes, -1) @ (1 << np.arange(r))
    listed = symbols == 1023
    pairs = np.unpackbits(data, count=10 * listed.sum()).reshape(-1, 10)
    symbols[listed] = pairs @ (1 << np.arange(10)[::-1])
    whole = listed & (symbols == 1023)
    bins = np.stack(np.divmod(symbols, 32), -1)
    data = data[math.ceil(pairs.size / 8) :]
  else:
    whole = symbols >> told[:, 0] == 255
  if kind == 'codes':
    bits = (bins + told << r | raw) ^ 128
  elif is_pair:
    m = finfo(dtype).nmant
    bits = bins + (0 if raised else told) << m - t | raw % (1 << r - 1) << m + 1 - t - r
    if raised:  # small numbers share a step
      small = np.ldexp(bits % (1 << m) * 1.0, told - 1 + finfo(dtype).minexp - m)
      small = small.astype(dtype).view(unsigned)
      bits = np.where(bits >> m, bits + (told - 1 << m), small)
    bits |= raw >> r - 1 << 8 * dtype.itemsize - 1
  bits = bits.astype(unsigned)
  bits[whole] = data.view(unsigned).reshape(-1, bits.shape[1])
  return bits[:count]


def read_group(group, tables, blocks, parts, known=None):
  """The bits of the parts of a group, one part after the other."""
  kind, *_ = group
  take = io.BytesIO(zlib.decompress(tables, -15)).read
  numbers = lambda n: np.int64(np.frombuffer(take(n), 'u1'))
  levels, step = (4, 2) if kind == 'floats' else (32, 1)
  unit, size, count = (2, 32, levels) if kind in PAIRS else (1, 255, 256)
  base = np.cumsum(np.frombuffer(take(512 if unit == 1 and group[1] else 2), '<i2'))
  classes = [known]
  if known is None:
    classes, heads = [], numbers(2 * len(parts)).reshape(-1, 2)
    for (mode, least), part in zip(heads, parts, strict=True):
      rows, columns = math.prod(part.shape[:-1]), math.prod(part.shape[-1:])
      if part.ndim == 1:
        rows, columns = math.ceil(columns / 128), 128
      shared = 1 if columns % unit else unit
      place = np.full((rows, columns), least)
      place += numbers(rows)[:, None] if mode & 1 else 0
      place += numbers(columns // shared).repeat(shared) if mode & 2 else 0
      classes.append(place.ravel()[: part.size : unit] % 256)
  stored = np.cumsum(numbers(count)) - 1
  p = 14 if kind == 'floats' else 12
  frequencies = ([1, 256] @ numbers(-1).reshape(2, -1)).reshape(-1, size)[stored]
  if unit == 2:  # of bins
    frequencies = (frequencies[:, :, None] * frequencies[:, None]).reshape(count, -1)
    frequencies = frequencies[:, :-1] + (1 << 27 - p) >> 28 - p
  escape = (1 << p) - frequencies.sum(1, keepdims=True)
  frequencies = np.append(frequencies, escape, 1)
  k, dtype = np.concatenate(classes), parts[0].dtype
  told = k, np.resize(base, 256)[k]
  if unit == 2:
    told = k % levels, k // levels * step + base
  ends = range(0, k.size, math.ceil(k.size / math.ceil(k.size / (1 << 19))))[1:]
  pieces = zip(blocks, *(np.split(x, ends) for x in told), strict=True)
  bits = np.vstack([read_block(*x, frequencies, group, dtype) for x in pieces])
  ends = np.cumsum([math.ceil(part.size / unit) for part in parts])[:-1]
  for part, numbers in zip(parts, np.split(bits, ends), strict=True):
    yield numbers.ravel()[: part.size].reshape(part.shape)


def read_record(spec, stream):
  """The arrays of a record; functions of the classes if these are known."""
  arrays, groups, take = spec['arrays'], spec['groups'], io.BytesIO(stream).read
  parts = []  # with their groups
  for name, shape, _, of_parts, zeros in arrays:
    dtype, n = np.dtype(name), math.prod(shape)
    forms = [(shape, dtype)]
    if zeros:
      mask = math.prod(shape[:-1]), math.ceil(math.prod(shape[-1:]) / 8)
      signs = math.ceil((n - zeros[0]) / 8) if zeros[1] else 0
      forms = [(mask, 'u1'), (signs, 'u1'), (zeros[0], dtype)]
    elif dtype.itemsize == 8 or (dtype.itemsize > 1 and dtype.kind == 'u'):
      forms = [((n, dtype.itemsize), 'u1')]
    parts += zip(of_parts, (np.empty(*form) for form in forms), strict=True)
  tables, decoded = [take(group[2]) for group in groups], {}
  for g, group in enumerate(groups):
    blocks, members = [take(n) for n in group[3]], [x for i, x in parts if i == g]
    read = functools.partial(read_group, group, tables[g], blocks, members)
    decoded[g] = iter([read]) if group[0] == 'known' else read()
  stored = lambda part: np.ndarray(part.shape, part.dtype, take(part.nbytes))
  decoded[None] = (stored(part) for g, part in parts if g is None)
  for dtype, shape, crc32, of_parts, zeros in arrays:
    array, *others = (next(decoded[g]) for g in of_parts)
    if zeros:  # the array is a mask
      signs, values = others
      is_set = np.unpackbits(array, axis=1, count=shape[-1]) > 0
      array = np.zeros(is_set.shape, values.dtype)
      array[is_set] = values
      if zeros[1]:
        negative = np.unpackbits(signs, count=np.count_nonzero(~is_set))
        array[~is_set] = negative.astype(array.dtype) << 8 * array.itemsize - 1
    if not callable(array):
      assert zlib.crc32(array.tobytes()) == crc32, 'an array is damaged'
      array = array.view(dtype).reshape(shape)
    yield array


def product(p, tensors, base, dtype, hidden):
  """A product with tensors of the dense model, in float32."""
  rounded = lambda x: np.float64(np.float32(x).astype(dtype)) if p.get('rounded') else x
  power = lambda x, k: k - np.frexp(abs(x).max(-1, keepdims=True))[1]
  bases = [np.float64(tensors[f'subspaces.{i}/basis']) for i in p.get('segments', [])]
  kind, k, unit = p['kind'], 26 - (hidden.bit_length() + 1) // 2, 25
  if kind == 'shortcut':
    return np.float32(np.ldexp(bases[0].T @ bases[1], -50))
  x, *others = (rounded(np.float64(base[path])) for path, *_ in p['arrays'])
  x = x if kind == 'writes' or p.get('transposed') else x.T
  if kind == 'reads':
    x = rounded(x * others[0])
  elif kind == 'bias':
    unit = power(others[0], k)
    bases = [np.rint(np.ldexp(others[0], unit))[:, None]]
  elif p.get('centred'):
    n = power(x, 52 - (hidden - 1).bit_length())
    i = np.rint(np.ldexp(x, n))
    x = rounded(np.ldexp(i - i.sum(-1, keepdims=True) / hidden, -n))
  n = power(x, k)
  x = np.ldexp(np.rint(np.ldexp(x, n)) @ bases[0], -n - unit)
  x = x[:, 0] + sum(others[1:]) if kind == 'bias' else x
  return np.float32(x.T if kind == 'reads' else x)


def beside_head(head, map, scale):
  """The product of a head and a map, of integers of 16 bits in two bytes."""
  powers, high, low = [], [], []
  for x in (np.float32(head), np.float32(map)):
    e = np.frexp(abs(x).max(0) * np.float32(1 + 2**-7))[1]
    powers.append(15 - np.maximum(e, -35))
    y = np.rint(np.ldexp(np.float64(x), powers[-1]))
    high.append(np.floor((y + 128) / 256))
    low.append(y - 256 * high[-1])
  sums = 256 * (high[0].T @ high[1]) + high[0].T @ low[1] + low[0].T @ high[1]
  sums += np.floor((low[0].T @ low[1] + 128) / 256)
  sums = np.float32(sums.astype(np.int64).astype(np.int32))
  return np.ldexp(sums, 8 - powers[0][:, None] - powers[1] - scale)


def difference(leaf, s, a, tensors, base, config):
  """An array that differs little from a known one."""
  dtype, n = np.dtype(leaf['dtype']), math.prod(leaf['shape'])
  if 'map' in a:
    known = beside_head(tensors['head/kernel'], a['map'], s.get('scale', 0))
  elif 'product' in leaf:
    known = product(leaf['product'], tensors, base, dtype, config['hidden_size'])
  else:
    known = base[leaf['base'][0]]
  signed = np.dtype(f'i{dtype.itemsize}')
  b = np.ravel(known.astype(dtype, order='C'))[:n].view(signed)
  b = np.pad(b, (0, n - b.size)).reshape(-1, s.get('width', 1))
  d, top = np.zeros_like(b), np.iinfo(signed).max
  m = finfo(dtype).nmant if 'float' in dtype.name else 0
  if 'left' in a:
    numbers = np.float64(b.view(dtype))
    p = np.ldexp(np.float64(a['left']) @ a['right'], s.get('unit', 0))
    near = np.float32(numbers + p).astype(dtype).view(signed)
    b = np.where(np.isfinite(numbers), near, b)
  if 'drift' in a:
    drift = a['drift'][b % (1 << m) >> max(m - 8, 0)].astype(signed)
    b = b + drift * (((b & top) >> m) % ((1 << finfo(dtype).nexp) - 1) > 0)
  if 'differences' in a:
    e = np.maximum(np.int64(b & top) >> m, 1) if m else np.zeros(b.shape, np.int64)
    rows, columns = (np.int64(a.get(x, 0)) for x in ('row_scales', 'column_scales'))
    level = s.get('common_scale', 0) + rows[..., None] + columns - 8 * e >> 1
    differs = np.unpackbits(a.get('changed', np.uint8([255])), bitorder='little') > 0
    differs = np.resize(np.repeat(differs, 65536), n).reshape(b.shape)
    read = a['differences'](np.clip(level + 24, 0, 255)[differs])
    d[differs] = next(read).view(signed).ravel()
  if m:  # the sum of ordinals, of numbers without the signs of b
    ordinal = (b & top) + d
    b, d = ordinal ^ (ordinal >> 8 * b.itemsize - 1 & top) ^ (b & ~top), 0
  return (b + d).view(dtype)


def read_leaf(leaf, arrays, tensors, base, config):
  """The array of a leaf."""
  kind, s, a = leaf.get('type_name'), leaf.get('settings', {}), {}
  if kind not in (None, 'difference'):
    a = {k: np.float32(x) * arrays.get(f'{k}_step', 1) for k, x in arrays.items()}
  for name in [k for k in a if f'{k}_corner' in a]:  # triangles
    corner = a[f'{name}_corner']
    top = np.tri(math.isqrt(2 * corner.size), a[name].shape[1], dtype=np.float32)
    top[top > 0] = corner
    a[name] = np.vstack([top, a[name]])
  gram = lambda b: np.vstack([np.eye(b.shape[1]) - b.T @ b / 4, b])
  match kind:
    case None:
      shift = {'int2': 6, 'int4': 4}.get(leaf['dtype'])
      return arrays[''] << shift >> shift if shift else arrays['']
    case 'difference':
      array = difference(leaf, s, arrays, tensors, base, config)
    case 'block_quantized':
      a = arrays
      scales = (np.uint32(a['scales']) << s.get('shift', 0)).view('f4')
      if 'factor' in a:
        scales = a['scales'].view('float8_e4m3fn').astype('f4') * a['factor']
      array = a['numbers'].astype('f4').reshape(-1, a['numbers'].shape[-1])
      if s['grid'] in ('int4', 'float4_e2m1fn'):
        array[array == -16] = -0.0
        array /= 1 if s['grid'] == 'int4' else 2
      blocks = zip(array.shape, s['block'], strict=True)
      places = np.ix_(*(np.arange(n) // m for n, m in blocks))
      minima = a.get('minima', np.full(scales.shape, -0.0, 'f4'))[places]
      array = (array * scales[places] + minima).astype(s['name']).ravel()
      array[np.cumsum(np.int64(a.get('gaps', [])) + 1) - 1] = a.get('exceptions', 0)
    case 'basis':
      array = np.float64(arrays['numbers']) * s['step']
      if 'mask' in arrays:
        m, d = array.shape
        one = lambda n: 2.0**25 * np.eye(n)
        scaled = lambda x: np.rint(x * 2.0**-25)
        g, z = scaled(array @ array.T) + one(m), np.rint(one(m) * (2 / 3))
        for _ in range(5):
          z = scaled(z @ (2 * one(m) - scaled(g @ z)))
        low = 2 * scaled(z @ array)
        rows = one(d) - scaled(array.T @ low), low
        is_top = np.unpackbits(arrays['mask'], count=m + d, bitorder='little') > 0
        array = np.vstack(rows)[np.argsort(np.argsort(~is_top, stable=True))]
    case 'constant':
      array = np.full(leaf['shape'], arrays['value'])
    case 'identity_minus_gram':
      square = np.eye(len(a['b'])) - a['b'] @ a['b'].T + a['c'] @ a['c'].T
      array = np.pad(square, ((0, 0), (0, s['columns'] - len(square))))
    case 'trapezoidal_rows':
      array = np.vstack([*a.get('full', []), *a['lower'].T])
      if 'pivots' in a:
        order = np.argsort(1 - a['pivots'], stable=True)
        last = slice(len(array) - a['lower'].shape[1], None)
        array[last, order] = a['lower'].T
    case 'head_bases' if s.get('group'):
      bases = [gram(b.T) for b in np.split(a['below'], s['heads'])]
      array = np.vstack([x.T for b in bases for x in np.split(b, s['group'])])
    case 'head_bases':
      bases = [gram(b) for b in np.split(a['below'], s['heads'], 1)]
      rotary = np.split(a.get('rotary', bases[0][:, :0]), s['heads'], 1)
      array = np.hstack([x for pair in zip(rotary, bases, strict=True) for x in pair])
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
  base = safetensors_numpy.load_file(base) if base else {}
  data = pathlib.Path(path).read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  streams, data = json.loads(data[8:start]), data[start:]
  assert streams.pop('__metadata__')['version'] == '1', 'not a file of version 1'
  streams = {name: data[slice(*x['data_offsets'])] for name, x in streams.items()}
  manifest = json.loads(zlib.decompress(streams['manifest']))
  tensors, empty = {}, []
  # Records with leaves that need others come last.
  needs = lambda record: any('needs' in leaf for leaf in record['leaves'])
  for record in sorted(manifest['records'], key=needs):
    arrays, joined = read_record(record['spec'], streams[record['name']]), {}
    # Leaves without arrays of their own are last, together.
    is_joined = lambda leaf: 'arrays' in leaf and 'type_name' not in leaf
    for leaf in sorted(record['leaves'], key=is_joined):
      a = {name: next(arrays) for name in leaf.get('arrays', [''])}
      if is_joined(leaf):
        dtype, size = leaf['dtype'], math.prod(leaf['shape'])
        left = joined[dtype] if dtype in joined else next(arrays)
        a, joined[dtype] = {'': left[:size].reshape(leaf['shape'])}, left[size:]
      tensors[leaf['path']] = read_leaf(leaf, a, tensors, base, manifest.get('config'))
    empty += record.get('empty', [])
  tensors = {k: x.copy() for k, x in tensors.items() if not k.startswith('subspaces.')}
  safetensors_numpy.save_file(tensors, output, {'empty': json.dumps(empty)})


if __name__ == '__main__':
  main(*sys.argv[1:])
