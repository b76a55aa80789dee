"""Reads structured leaves for `numpy_decoder`, from docs/format_leaves.md alone."""

import math
import zlib

from ml_dtypes import finfo  # which makes its dtypes known to NumPy
import numpy as np


def product(p, tensors, base, dtype, hidden):
  """A product with tensors of the dense model, in float32."""
  kind, k, unit = p['kind'], 26 - (hidden.bit_length() + 1) // 2, 25
  rounded = lambda x: np.float64(np.float32(x).astype(dtype)) if p.get('rounded') else x
  bases = [np.float64(tensors[f'subspaces.{i}/basis']) for i in p.get('segments', [])]

  def integers(x, k):
    power = k - np.frexp(abs(x).max(-1, keepdims=True))[1]
    return np.rint(np.ldexp(x, power)), power

  if kind == 'shortcut':
    return np.float32(np.ldexp(bases[0].T @ bases[1], -50))
  x, *others = (rounded(np.float64(base[path])) for path, *_ in p['arrays'])
  x = x if kind == 'writes' or p.get('transposed') else x.T
  if kind == 'reads':
    x = rounded(x * others[0])
  elif kind == 'bias':
    vector, unit = integers(others[0], k)
    bases = [vector[:, None]]
  elif p.get('centred'):
    i, power = integers(x, 52 - (hidden - 1).bit_length())
    x = rounded(np.ldexp(i - i.sum(-1, keepdims=True) / hidden, -power))
  i, power = integers(x, k)
  x = np.ldexp(i @ bases[0], -power - unit)
  x = x[:, 0] + sum(others[1:]) if kind == 'bias' else x
  return np.float32(x.T if kind == 'reads' else x)


def beside_head(head, map, scale):
  """The product of a head and a map, of integers of 16 bits but two low bytes."""
  integers, low, powers = [], [], []
  for x in (np.float64(head), np.float64(map)):
    e = np.frexp(abs(x).max(0) * 128 / 127)[1]
    powers.append(15 - np.maximum(e, -35))
    integers.append(np.rint(np.ldexp(x, powers[-1])))
    low.append((integers[-1] + 128) % 256 - 128)
  sums = (integers[0].T @ integers[1] - low[0].T @ low[1]) / 256
  sums = np.float32(sums.astype(np.int64).astype(np.int32))
  return np.ldexp(sums, 8 - powers[0][:, None] - powers[1] - scale)


def predicted(leaf, a, tensors, base, config):
  """The bits that are known of an array near another one, and which elements differ."""
  dtype, n, s = np.dtype(leaf['dtype']), math.prod(leaf['shape']), leaf['settings']
  if 'map' in a:
    known = beside_head(tensors['head/kernel'], a['map'], s.get('scale', 0))
  elif 'product' in leaf:
    known = product(leaf['product'], tensors, base, dtype, config['hidden_size'])
  else:
    known = base[leaf['base'][0]]
  b = np.ravel(known.astype(dtype, order='C'))[:n].view(f'i{dtype.itemsize}')
  b = np.pad(b, (0, n - b.size))
  if 'left' in a:
    numbers = np.float64(b.view(dtype)).reshape(len(a['left']), -1)
    p = np.ldexp(np.float64(a['left']) @ a['right'], s.get('unit', 0))
    near = np.float32(numbers + p).astype(dtype).view(b.dtype)
    b = np.where(np.isfinite(numbers), near, b.reshape(numbers.shape)).ravel()
  if 'drift' in a:
    m, e = finfo(dtype).nmant, (1 << finfo(dtype).nexp) - 1
    drift = a['drift'][b % (1 << m) >> max(m - 8, 0)].astype(b.dtype)
    b = b + drift * ((b >> m & e) % e > 0)
  differs = np.unpackbits(a.get('changed', np.uint8([255])), bitorder='little') > 0
  return b, np.resize(np.repeat(differs, 65536), n)


def floats(codes, form):
  """The float32 of codes of scales and of minima."""
  n = codes.astype(np.int64) + form[0]
  return np.uint32((np.abs(n) << form[1]) | (n < 0) << 31).view('f4')


def read_leaf(leaf, arrays, tensors, base, config):
  """The array of a leaf."""
  kind, s, a = leaf.get('type_name'), leaf.get('settings', {}), arrays
  if kind not in (None, 'difference', 'block_quantized', 'basis'):
    a = {k: np.float32(x) * arrays.get(f'{k}_step', 1) for k, x in arrays.items()}
  for name in [k for k in a if f'{k}_corner' in a]:  # triangles
    corner = a[f'{name}_corner']
    top = np.tri(math.isqrt(2 * corner.size), a[name].shape[1], dtype=np.float32)
    top[top > 0] = corner
    a[name] = np.vstack([top, a[name]])
  gram = lambda b: np.vstack([np.eye(b.shape[1]) - b.T @ b / 4, b])
  match kind:
    case None:
      is_packed = leaf['dtype'] in ('int2', 'int4')
      array = a[''].astype(leaf['dtype']).astype('i1') if is_packed else a['']
      return array.reshape(leaf['shape'])
    case 'difference':
      array, differs = predicted(leaf, a, tensors, base, config)
      if 'elements' in a:
        array[differs] = a['elements'].view(array.dtype).ravel()
      array = array.view(leaf['dtype'])
    case 'block_quantized':
      scales = floats(a['scales'], s.get('scale_form', (0, 0))) * a.get('factor', 1)
      least = np.full(scales.shape, -0.0, 'f4')
      if 'minima' in a:
        least = floats(a['minima'], s.get('minimum_form', (0, 0)))
      array = a['numbers'].astype('f4').reshape(-1, a['numbers'].shape[-1])
      if s['grid'] in ('int4', 'float4_e2m1fn'):
        array[array == -16] = -0.0
        array /= 1 if s['grid'] == 'int4' else 2
      blocks = zip(array.shape, s['block'], strict=True)
      places = np.ix_(*(np.arange(n) // m for n, m in blocks))
      array = (array * scales[places] + least[places]).astype(s['name']).ravel()
      array[np.cumsum(np.int64(a.get('gaps', [])) + 1) - 1] = a.get('exceptions', 0)
    case 'basis' if 'mask' not in a:
      array = a['numbers'] * s['step']
    case 'basis':
      array = np.float64(a['numbers']) * s['step']
      m, d = array.shape
      one = lambda n: 2.0**25 * np.eye(n)
      scaled = lambda x: np.rint(x * 2.0**-25)
      g, z = scaled(array @ array.T) + one(m), np.rint(one(m) * (2 / 3))
      for _ in range(5):
        z = scaled(z @ (2 * one(m) - scaled(g @ z)))
      low = 2 * scaled(z @ array)
      rows = np.vstack([one(d) - scaled(array.T @ low), low])
      is_top = np.unpackbits(a['mask'], count=m + d, bitorder='little') > 0
      array = rows[np.argsort(np.argsort(~is_top, stable=True))]
    case 'constant':
      array = np.full(leaf['shape'], a['value'])
    case 'identity_minus_gram':
      square = np.eye(len(a['b'])) - a['b'] @ a['b'].T + a['c'] @ a['c'].T
      array = np.pad(square, ((0, 0), (0, s['columns'] - len(square))))
    case 'trapezoidal_rows':
      lower = a['lower'].T
      if 'pivots' in a:
        lower = lower[:, np.argsort(np.argsort(1 - a['pivots'], stable=True))]
      array = np.vstack([*a.get('full', []), *lower])
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
