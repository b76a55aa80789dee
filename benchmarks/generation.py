"""Tokens a second with shortcuts as `I - B B^T` and as plain matrices, side by side.

  python -m benchmarks.generation [--model=DIR|FILE] [--tokens=N] [--runs=N]

First the same sliced model writes the same text with both kinds of shortcut: `B` alone
is kept in memory and applied as `x - (x B) B^T` where that takes fewer products, or the
shortcuts are materialized. Then one shortcut product by itself, at two sizes, for one
token and for a batch. Both sides run in turn in one process; compare the ratios, since
machines differ. Medians; compilation is not timed. A model that is not encoded has its
residual gauge fixed first.
"""

from collections.abc import Callable
import functools
import itertools
import statistics
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import demo
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.cli import program
from rotbits_jax.models import generation
from rotbits_jax.models import transformer

PROMPT_TOKENS = 16
SIZES = ((432, 144), (3072, 1024))  # d, k: SmolLM2-135M and a model of 4096, 25% sliced
BATCHES = (1, 512)
PRODUCTS = 20  # timed together

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  'model', str(demo.WEIGHTS), 'A sliced model, encoded or not.', flag_values=FLAGS
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 64, 'Tokens to write in a run.', lower_bound=2, flag_values=FLAGS
)
_RUNS = flags.DEFINE_integer(
  'runs', 5, 'Timed runs of each.', lower_bound=1, flag_values=FLAGS
)


def _is_shortcut(leaf: Any) -> bool:
  return isinstance(leaf, structured.IdentityMinusGram)


def both_kinds(
  model: models.Model,
) -> tuple[models.Model, models.Model]:
  """The model with its shortcuts as they are, and as matrices; the rest is plain."""
  plain = model.materialize()
  params = jax.tree.map(
    lambda leaf, matrix: leaf if _is_shortcut(leaf) else matrix,
    model.params,
    plain.params,
    is_leaf=structured.is_structured,
  )
  compact = models.Model(params=params, buffers={}, config=model.config)
  return jax.device_put((compact, plain))


def shortcut_bytes(model: models.Model) -> int:
  """What the shortcuts take in memory."""
  return sum(
    leaf.nbytes
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    if any('shortcut' in str(key) for key in path)
  )


def all_bytes(model: models.Model) -> int:
  """What all parameters take in memory."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


def float32(tree: Any) -> Any:
  """The tree with its arrays in float32."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def medians(
  first: Callable[[], float], second: Callable[[], float], runs: int
) -> tuple[float, float]:
  """Medians of what both return, run in turn after one run each that is not counted."""
  pairs = [(first(), second()) for _ in range(runs + 1)][1:]
  a, b = zip(*pairs, strict=True)
  return statistics.median(a), statistics.median(b)


def tokens_a_second(model: models.Model, count: int) -> float:
  """Speed of the tokens after the first, whose time is the prompt's."""
  prompt = np.arange(PROMPT_TOKENS) % model.config.vocab_size
  tokens = generation.generate(model, prompt, max_tokens=count)
  next(tokens)
  start = time.perf_counter()
  written = sum(1 for _ in tokens)
  return written / (time.perf_counter() - start)


def product_seconds(kernel: Any, x: jax.Array) -> float:
  """Of `x @ kernel`, as the models compute it."""
  linear = _linear(kernel.shape[1])
  jax.block_until_ready(linear(kernel, x))
  start = time.perf_counter()
  for _ in range(PRODUCTS):
    jax.block_until_ready(linear(kernel, x))
  return (time.perf_counter() - start) / PRODUCTS


@functools.cache
def _linear(features: int) -> Callable[[Any, jax.Array], Any]:
  module = transformer.Linear(features)
  return jax.jit(lambda kernel, x: module.apply({'params': {'kernel': kernel}}, x))


def product_rows(runs: int) -> list[str]:
  """A line for each size, dtype and batch of a single shortcut product."""
  rng = np.random.default_rng(0)
  rows = []
  for (d, k), dtype in itertools.product(SIZES, (np.float16, np.float32)):
    b = jnp.asarray(np.tril(rng.standard_normal((d, k)) / d**0.5), dtype)
    compact = structured.IdentityMinusGram(b, jnp.zeros((d, 0), dtype), d)
    plain = compact.materialize()
    for batch in BATCHES:
      x = jnp.asarray(rng.standard_normal((batch, d)), jnp.float32)
      ours, theirs = medians(
        functools.partial(product_seconds, compact, x),
        functools.partial(product_seconds, plain, x),
        runs,
      )
      rows.append(
        f'{d:6}{k:6}{np.dtype(dtype).name:>9}{batch:7}{ours * 1e6:13,.0f}'
        f'{theirs * 1e6:14,.0f}{theirs / ours:9.2f}{d / (2 * k):11.2f}'
      )
  return rows


def main() -> None:
  model = program.read_model(_MODEL.value).model
  leaves = lambda: jax.tree.leaves(model.params, is_leaf=structured.is_structured)
  if not any(map(_is_shortcut, leaves())):
    model, _ = symmetries.run_chain((symmetries.remove_residual_gauge(),), model)
  if not any(map(_is_shortcut, leaves())):
    raise ValueError(f'{_MODEL.value}: no shortcut has the form I - B B^T')
  kinds = both_kinds(model)
  print(f'{jax.devices()[0].device_kind}, {_TOKENS.value} tokens, {_RUNS.value} runs')
  print(f'{"":32}{"I - B B^T":>13}{"materialized":>14}{"ratio":>9}')
  # Stored in fewer bits, weights are converted at every product, which takes time too.
  for stored, pair in (('as stored', kinds), ('in float32', float32(kinds))):
    compact, plain = pair
    fast, slow = medians(
      functools.partial(tokens_a_second, compact, _TOKENS.value),
      functools.partial(tokens_a_second, plain, _TOKENS.value),
      _RUNS.value,
    )
    name = f'tokens a second, {stored}'
    print(f'{name:32}{fast:13.1f}{slow:14.1f}{fast / slow:9.2f}')
  for name, measure in (('shortcuts', shortcut_bytes), ('parameters', all_bytes)):
    ours, theirs = map(measure, kinds)
    name = f'bytes of {name}, as stored'
    print(f'{name:32}{ours:13,}{theirs:14,}{theirs / ours:9.2f}')
  print(
    '\none shortcut product, microseconds; the last column is the ratio of products\n'
    f'{"d":>6}{"k":>6}{"stored":>9}{"batch":>7}{"I - B B^T":>13}{"materialized":>14}'
    f'{"ratio":>9}{"d / 2k":>11}'
  )
  print('\n'.join(product_rows(_RUNS.value)))


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
