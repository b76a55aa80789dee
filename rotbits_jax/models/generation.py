"""Text generation: one token after another, with a cache of keys and values.

The cache keeps the attention keys and values of all earlier tokens, so a step computes
only the new tokens. `models.forward` with a cache is the pure step, for `jit`,
`lax.scan` and `lax.while_loop`. `generate` loops over it on the host and yields each
token as soon as it is known.

Shape letters are those of `models.config` and `models.transformer`.
"""

from collections.abc import Collection, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.models import model as model_lib
from rotbits_jax.models import names
from rotbits_jax.models import transformer

PREFILL = 64  # tokens of the prompt in one step


def empty_cache(model: model_lib.Model, batch: int, room: int) -> transformer.Cache:
  """Makes a cache for `batch` sequences of up to `room` tokens, C in `Cache`."""
  config = model.config
  shape = (batch, room, config.num_kv_heads, config.head_dim)
  zeros = lambda size: jnp.zeros((size, *shape), jnp.float32)
  layers = {
    names.stack(stack): {name: zeros(len(stack)) for name in ('key', 'value')}
    for stack in model.stacks
  }
  return transformer.Cache(layers, jnp.zeros((), jnp.int32))


def sample(
  logits: jax.Array,
  key: jax.Array,
  *,
  temperature: jax.Array | float,
  top_k: int | None = None,
) -> jax.Array:
  """Draws tokens from `softmax(logits / temperature)`.

  The draw is `argmax(logits + temperature g)` with Gumbel noise g. At temperature 0 it
  is the likeliest token.

  Args:
    logits: `[..., V]`.
    key: a key of `jax.random`.
    temperature: the temperature, not negative.
    top_k: how many of the likeliest tokens to draw from; None for all.

  Returns:
    `[...]` int32.
  """
  if top_k is not None:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  noise = jax.random.gumbel(key, logits.shape, logits.dtype)
  return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)


def generate(
  model: model_lib.Model,
  tokens: np.ndarray,
  *,
  max_tokens: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  key: jax.Array | None = None,
  stop_tokens: Collection[int] = (),
) -> Iterator[int]:
  """Continues a sequence of tokens.

  For each size of the cache, two programs are compiled: one for the prompt and one for
  the tokens after it. The sizes are powers of two.

  Args:
    model: the model, dense or sliced; it may have structured leaves.
    tokens: `[T]` integers, the prompt.
    max_tokens: the largest number of tokens to add.
    temperature: see `sample`; 0 takes the likeliest token.
    top_k: see `sample`.
    key: a key of `jax.random`; required unless the temperature is 0.
    stop_tokens: tokens that end the sequence; they are not yielded.

  Yields:
    The tokens after the prompt, each as soon as it is known.

  Raises:
    ValueError: if an argument is out of range, if the prompt and `max_tokens` together
      exceed the model's positions, or if the predictions are not finite.
  """
  config = model.config
  tokens = np.asarray(tokens)
  if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(
      f'tokens must be [T] integers, got {tokens.shape=} {tokens.dtype=}'
    )
  if not tokens.size:
    raise ValueError(f'the prompt has no tokens, got {tokens.shape=}')
  config.check_tokens(tokens)
  if max_tokens < 1:
    raise ValueError(f'max_tokens must be positive, got {max_tokens}')
  if tokens.size + max_tokens > config.max_positions:
    raise ValueError(
      f'the model has {config.max_positions} positions, '
      f'got {tokens.size} tokens and {max_tokens=}'
    )
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature must be finite and not negative, got {temperature}')
  if top_k is not None and not 1 <= top_k <= config.vocab_size:
    raise ValueError(f'top_k must be from 1 to {config.vocab_size}, got {top_k}')
  if key is None:
    if temperature:
      raise ValueError(f'a temperature of {temperature} needs a key, got {key=}')
    key = jax.random.key(0)
  options = {'key': key, 'temperature': temperature, 'top_k': top_k}
  return _stream(model, tokens, max_tokens, frozenset(stop_tokens), options)


def _stream(
  model: model_lib.Model,
  prompt: np.ndarray,
  max_tokens: int,
  stop_tokens: frozenset[int],
  options: dict[str, Any],
) -> Iterator[int]:
  # Put the model on the device once. Leave out the buffers: the forward pass does not
  # use them, and they can have any dtype.
  model = jax.device_put(dataclasses.replace(model, buffers={}))
  step = min(PREFILL, model.config.max_positions)
  room = max(PREFILL, 1 << (prompt.size + max_tokens - 1).bit_length())
  cache = empty_cache(model, 1, room)
  for begin in range(0, prompt.size, step):
    piece = prompt[begin : begin + step].astype(np.int32)
    # Not beyond the last position: what has none is NaN.
    width = min(step, model.config.max_positions - begin)
    # The padding is a token of the prompt, because those that no text has may be NaN.
    padded = np.pad(piece, (0, width - piece.size), 'edge')[None]
    token, cache = _next_token(model, cache, padded, piece.size, **options)
  for count in range(max_tokens):
    if count:
      token, cache = _next_token(model, cache, token[None, None], 1, **options)
    value = int(token)
    if value < 0:
      raise ValueError('the predictions of the model are not finite')
    if value in stop_tokens:
      return
    yield value


@functools.partial(jax.jit, static_argnames='top_k', donate_argnames='cache')
def _next_token(
  model: model_lib.Model,
  cache: transformer.Cache,
  tokens: jax.Array,
  count: jax.Array | int,
  *,
  key: jax.Array,
  temperature: jax.Array | float,
  top_k: int | None,
) -> tuple[jax.Array, transformer.Cache]:
  """Draws the token after the first `count` of `[1, T]` tokens; the rest are padding.

  The padding leaves keys and values in the cache. They do no harm, because later tokens
  overwrite them before any token attends to them.

  Returns:
    The token, `[]` int32, or -1 if the logits are not finite; and the cache.
  """
  found = transformer.forward(model.params, model.config, tokens, cache=cache)
  assert found.cache is not None
  length = cache.length + count
  last = found.logits[0, count - 1]
  token = sample(
    last, jax.random.fold_in(key, length), temperature=temperature, top_k=top_k
  )
  token = jnp.where(jnp.isfinite(last).all(), token, -1)
  return token, found.cache._replace(length=length)
