"""Measures the coder alone: streams of weights, the parts of decoding, and rotations.

A stream of weights is what a file has for a record: an array whose rows and columns
differ in scale, encoded to bytes and decoded into the same memory on all CPUs.

Bits-back over O(n) pops a rotation and computes its matrix, and then recovers it from a
matrix with errors of 1e-4 and pushes it back.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import pathlib
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import common
import rotbits_jax
from rotbits_jax import pool
from rotbits_jax.coding import blocks
from rotbits_jax.coding import coder
from rotbits_jax.coding import layouts
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import codes
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import haar
from rotbits_jax.system import checksums
from rotbits_jax.system import files

TITLE = 'The coder'
RUNS = 5
REST = 'copy to the result, the rest'
PARTS = {
  'loop': (blocks, 'run'),
  'read, with CRC-32': (files.File, 'read'),
  'classes': (blocks, '_field'),
  'lists of escapes': (layouts.Pairs, 'listed'),
  'CRC-32 of the result': (checksums, 'of_array'),
}
"""The functions that decoding a record consists of."""


def weights(count: int, dtype: Any) -> np.ndarray:
  """Draws normally distributed weights whose rows and columns differ in scale."""
  rng, width = np.random.default_rng(0), 1024
  octaves = rng.normal(0, 0.4, (count // width, 1)) + rng.normal(0, 0.3, width)
  numbers = rng.standard_normal((count // width, width), np.float32)
  return (numbers * np.exp2(octaves - 5)).astype(dtype)


def streams(count: int) -> str:
  """Returns the table of streams of weights."""
  rows = []
  for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
    array = weights(count, dtype)
    encoded, out = coder.encode([array]), [np.empty_like(array)]
    spec, data = encoded.spec, encoded.data
    decode = lambda: coder.decode(spec, data, out=out)  # noqa: B023
    encode = lambda: coder.encode([array]).pieces  # noqa: B023
    seconds = [common.median_seconds(work, RUNS) for work in (encode, decode)]
    if out[0].tobytes() != array.tobytes():
      raise ValueError('the decoded weights differ')
    rates = (f'{array.nbytes / x / 1e6:,.0f}' for x in seconds)
    share = data.size / array.nbytes
    rows.append((np.dtype(dtype).name, *rates, f'{share:.4f}'))
  header = ('weights', 'encode MB/s', 'decode MB/s', 'bytes per byte')
  return common.table(header, rows)


def parts_of_decoding(count: int) -> str:
  """Returns the table of what one thread does to decode a record of a file."""
  array, spent = weights(count, np.float16), collections.Counter[str]()

  def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
      start = time.perf_counter()
      result = function(*arguments, **options)
      spent[name] += round(1e9 * (time.perf_counter() - start))
      return result

    return call

  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    path = pathlib.Path(folder, 'x.rotbits')
    path.write_bytes(rotbits_jax.encode({'a': array}))
    decode = rotbits_jax.file.Reader(path).decode
    replace = lambda *names: stack.enter_context(mock.patch.object(*names))
    replace(pool, 'run', lambda jobs: [job() for job in jobs])
    for name, place in PARTS.items():
      replace(*place, timed(name, getattr(*place)))
    runs = []
    for _ in range(16):
      spent.clear()
      timed(REST, decode)('a', rows={'a': [np.empty_like(array)]})
      runs.append({**spent, REST: 2 * spent[REST] - spent.total()})
  least = {name: min(run[name] for run in runs) / count for name in (*PARTS, REST)}
  least['in all'] = sum(least.values())
  rows = [(name, f'{x:.2f}') for name, x in least.items()]
  return common.table(('part', 'ms'), rows)


def rotation(n: int) -> tuple[float, float, float, float]:
  """Measures bits-back over O(n).

  Returns the seconds to pop a rotation, and to recover it and push it back; and the
  bits that it takes and that come back, for each of n (n - 1) / 2 parameters.
  """
  lanes = 64
  depth = 2 * n * n // lanes + 64
  words = jax.random.bits(jax.random.key(0), (depth, lanes), jnp.uint16)
  message = rans.stacked(words)
  code = codes.haar_code(n, n)
  popped, cells, q = code.sample(message)
  noise = jax.random.normal(jax.random.key(1), (n, n), jnp.float32)
  recovered = jax.jit(lambda q: jnp.linalg.qr(q + 1e-4 / n**0.5 * noise)[0])(q)
  recovered = recovered * jnp.sign(jnp.sum(recovered * q, axis=0))
  correction = code.correct(recovered, recovered, cells)
  again, _ = code.restore(popped, recovered, correction)
  if not np.array_equal(rans.unstacked(rans.check(again)), np.asarray(words)):
    raise ValueError('the message did not come back')
  arrays, residues = correction_lib.pack(correction, code.groups())
  sent = 8 * (coder.encode(arrays).data.size + residues.nbytes)
  taken = rans.content_bits(message) - rans.content_bits(popped)
  parameters = n * (n - 1) / 2
  return (
    common.median_seconds(lambda: code.sample(message), RUNS),
    common.median_seconds(lambda: code.restore(popped, recovered, correction), RUNS),
    taken / parameters,
    (taken - sent) / parameters,
  )


def haar_bias(n: int, messages: int, pops: int) -> np.ndarray:
  """Returns means of entries of popped rotations, relative to n^(-1/2): `[n, n]`.

  That is the standard deviation under the Haar measure; the means should be 0.
  """

  @jax.jit
  def means(key: jax.Array) -> jax.Array:
    words = jax.random.bits(key, (2 * pops + 64, 64), jnp.uint16)

    def pop(message: rans.Message, _: None) -> tuple[rans.Message, jax.Array]:
      message, cells = haar.codec(n, n).pop(message)
      return message, haar.rotation(cells, n, n)

    _, rotations = jax.lax.scan(pop, rans.stacked(words), length=pops)
    return rotations.mean(axis=0)

  keys = jax.random.split(jax.random.key(0), messages)
  return n**0.5 * np.mean([np.asarray(means(key), np.float64) for key in keys], axis=0)


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  count = 1 << 22
  rotations = []
  for n in (128, 512):
    pop, push, taken, back = rotation(n)
    seconds = f'{1e3 * pop:.1f}', f'{1e3 * push:.1f}'
    rotations.append((n, *seconds, f'{taken:.2f}', f'{back:.2f}'))
  runs, pops = 64, 2048
  biases, noise = np.abs(haar_bias(16, runs, pops)), (runs * pops) ** -0.5
  parts = [
    f'Records of {count:,} normally distributed weights, coded as in a file:',
    streams(count),
    'Milliseconds per million weights of what one thread does to decode a file of such '
    'weights in float16, least of 16 runs:',
    parts_of_decoding(2 * count),
    'Rotations in n dimensions by bits-back, with the bits per parameter that are '
    'popped and those that come back:',
    common.table(('n', 'pop ms', 'push ms', 'taken', 'back'), rotations, texts=0),
    'Means of the entries of popped rotations in O(16), which should be 0, relative to '
    f'their standard deviation: {np.sqrt(np.mean(biases**2)):.2%} in the root mean '
    f'square, {biases.max():.2%} at most; measurement noise is {noise:.2%}.',
  ]
  yield common.Section(TITLE, '\n\n'.join(parts))
