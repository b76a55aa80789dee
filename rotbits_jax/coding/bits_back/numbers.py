"""Arrays of floating-point numbers on a message, as they are or entropy coded.

For bits-back coding, where all numbers share one message; `arrays` codes units that
decode on their own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import floats

Spec = tuple[str, tuple[int, ...]]  # dtype and shape of an array


@functools.partial(jax.jit, donate_argnums=0)
def _push_words(message: rans.Message, words: jax.Array) -> rans.Message:
  return codecs.uniform(jnp.full(words.shape, 1 << 16)).push(message, words)


@functools.partial(jax.jit, static_argnums=1)
def _pop_words(message: rans.Message, count: int) -> tuple[rans.Message, jax.Array]:
  message, words = codecs.uniform(jnp.full((count,), 1 << 16)).pop(message)
  return message, words.astype(jnp.uint16)


def _modelled_codec(
  contexts: jax.Array, frequencies: jax.Array, rest: int
) -> codecs.Codec:
  """Codec of symbols and rests: the rest's bits in halves of at most 16."""
  uniform = lambda bits: codecs.uniform(jnp.full(contexts.shape, 1 << bits))
  return codecs.serial(
    uniform(min(rest, 16)),
    uniform(max(rest - 16, 0)),
    codecs.categorical(contexts, frequencies),
  )


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _push_modelled(
  message: rans.Message,
  values: jax.Array,
  contexts: jax.Array,
  table: jax.Array,
  rest: int,
) -> rans.Message:
  symbols, rests = floats.split(values)
  rests = rests.astype(jnp.uint32)
  parts = rests & 0xFFFF, rests >> 16, symbols
  return _modelled_codec(contexts, table, rest).push(message, parts)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _pop_modelled(
  message: rans.Message, contexts: jax.Array, table: jax.Array, rest: int, dtype: str
) -> tuple[rans.Message, jax.Array]:
  codec = _modelled_codec(contexts, table, rest)
  message, (low, high, symbols) = codec.pop(message)
  return message, floats.join(symbols, low | high << 16, jnp.dtype(dtype))


def _by_dtype(specs: list[Spec]) -> dict[str, list[int]]:
  groups: dict[str, list[int]] = {}
  for i, (dtype, _) in enumerate(specs):
    groups.setdefault(dtype, []).append(i)
  return groups


def push(
  message: rans.Message, arrays: list[np.ndarray], *, entropy: bool
) -> tuple[rans.Message, list[np.ndarray]]:
  """Pushes arrays, those of one dtype together.

  Args:
    message: the message; its buffers are reused.
    arrays: of dtypes in `floats.LAYOUTS`.
    entropy: whether to model exponents and top mantissa bits.

  Returns:
    The message and the frequency tables, one an array if `entropy`, else none.

  Raises:
    ValueError: if an array's dtype is not known.
  """
  rows = []
  for dtype, members in _by_dtype([(x.dtype.name, x.shape) for x in arrays]).items():
    flat = [np.ascontiguousarray(arrays[i]).reshape(-1) for i in members]
    if flat[0].dtype not in floats.LAYOUTS:
      raise ValueError(f'numbers of this dtype have no rotation, got {dtype}')
    joined = np.concatenate(flat)
    if not entropy:
      message = _push_words(message, joined.view(np.uint16))
      continue
    layout = floats.LAYOUTS[joined.dtype]
    own = [_table(x, layout.alphabet) for x in flat]
    contexts = np.repeat(np.arange(len(flat), dtype=np.uint32), [x.size for x in flat])
    message = _push_modelled(message, joined, contexts, np.stack(own), layout.rest_bits)
    rows += own
  return message, rows


def pop(
  message: rans.Message, specs: list[Spec], rows: list[np.ndarray] | None
) -> tuple[rans.Message, list[np.ndarray]]:
  """The inverse of `push`; `rows` are its tables, or None without `entropy`."""
  arrays: list[Any] = [None] * len(specs)
  sizes = [int(np.prod(shape, dtype=np.int64)) for _, shape in specs]
  rows = list(rows or [])
  for dtype, members in reversed(_by_dtype(specs).items()):
    kind = jnp.dtype(dtype)
    count = [sizes[i] for i in members]
    if rows:
      layout = floats.LAYOUTS[np.dtype(kind)]
      own = np.stack([rows[len(rows) - len(count) + i] for i in range(len(count))])
      del rows[len(rows) - len(count) :]
      contexts = np.repeat(np.arange(len(count), dtype=np.uint32), count)
      message, values = _pop_modelled(
        message, contexts, own[:, : layout.alphabet], layout.rest_bits, dtype
      )
      joined = np.asarray(values)
    else:
      message, words = _pop_words(message, sum(count) * kind.itemsize // 2)
      joined = np.asarray(words).view(kind)
    for i, part in zip(members, np.split(joined, np.cumsum(count)[:-1]), strict=True):
      arrays[i] = part.reshape(specs[i][1])
  return message, arrays


def _table(values: np.ndarray, alphabet: int) -> np.ndarray:
  symbols = np.asarray(floats.split(jnp.asarray(values))[0])
  counts = np.bincount(symbols, minlength=alphabet)
  return tables.quantize(counts if values.size else counts + 1)
