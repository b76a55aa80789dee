"""Compares the speed of shortcuts stored as `I - B B^T` with that of plain matrices.

  python -m benchmarks.generation [--model=DIR|FILE] [--tokens=N] [--runs=N]

A shortcut is the matrix that leads from one segment of a sliced model's residual stream
to the next. First the same model generates the same text with both kinds of shortcut.
In the compact kind only B is in memory, and it is applied as `x - (x B) B^T` if that
takes fewer multiplications. In the plain kind the shortcuts are materialized. Then a
single product with a shortcut is measured, at two sizes, for one token and for a batch.
Both kinds take turns in one process. Compare the ratios, because machines differ in
speed. Times are medians; compilation is not timed. If the model is not encoded, its
residual gauge is fixed first, which makes the compact shortcuts.
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
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.cli import program
from rotbits_jax.models import generation
from rotbits_jax.models import linear

PROMPT_TOKENS = 16
SIZES = ((432, 144), (3072, 1024))  # d, k: SmolLM2-135M and a model of 4096, 25% sliced
BATCHES = (1, 512)
PRODUCTS = 20  # number of products that are timed together

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  'model',
  str(demo.WEIGHTS),
  'A sliced model: a checkpoint or a file.',
  flag_values=FLAGS,
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 64, 'Tokens to generate in a run.', lower_bound=2, flag_values=FLAGS
)
_RUNS = flags.DEFINE_integer(
  'runs', 5, 'Number of timed runs.', lower_bound=1, flag_values=FLAGS
)


def _is_shortcut(leaf: Any) -> bool:
  return isinstance(leaf, structured.IdentityMinusGram)


def both_kinds(
  model: models.Model,
) -> tuple[models.Model, models.Model]:
  """Returns the model with compact and with plain shortcuts; other leaves are plain."""
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
  """Returns the bytes of the shortcuts in memory."""
  return sum(
    leaf.nbytes
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    if any('shortcut' in str(key) for key in path)
  )


def all_bytes(model: models.Model) -> int:
  """Returns the bytes of all parameters in memory."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


def float32(tree: Any) -> Any:
  """Converts the arrays of a tree to float32."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def medians(
  first: Callable[[], float], second: Callable[[], float], runs: int
) -> tuple[float, float]:
  """Returns the medians of two functions' results.

  The functions take turns. The first run of each is not counted.
  """
  pairs = [(first(), second()) for _ in range(runs + 1)][1:]
  a, b = zip(*pairs, strict=True)
  return statistics.median(a), statistics.median(b)


def tokens_a_second(model: models.Model, count: int) -> float:
  """Returns the tokens per second. The first token is left out, with the prompt."""
  prompt = np.arange(PROMPT_TOKENS) % model.config.vocab_size
  tokens = generation.generate(model, prompt, max_tokens=count)
  next(tokens)
  start = time.perf_counter()
  written = sum(1 for _ in tokens)
  return written / (time.perf_counter() - start)


def product_seconds(kernel: Any, x: jax.Array) -> float:
  """Returns the seconds of one `x @ kernel`, computed as in the models."""
  jax.block_until_ready(_linear({'kernel': kernel}, x))
  start = time.perf_counter()
  for _ in range(PRODUCTS):
    jax.block_until_ready(_linear({'kernel': kernel}, x))
  return (time.perf_counter() - start) / PRODUCTS


_linear = jax.jit(linear.apply)


def product_rows(runs: int) -> list[str]:
  """Measures single products; returns a line for each size, dtype and batch."""
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
    model, _ = passes.run_chain((passes.remove_residual_gauge(),), model)
  if not any(map(_is_shortcut, leaves())):
    raise ValueError(f'{_MODEL.value}: no shortcut can be stored as I - B B^T')
  kinds = both_kinds(model)
  print(f'{jax.devices()[0].device_kind}, {_TOKENS.value} tokens, {_RUNS.value} runs')
  print(f'{"":32}{"I - B B^T":>13}{"materialized":>14}{"ratio":>9}')
  # 16-bit weights are converted in every product, which takes time, too. So both are
  # measured.
  for stored, pair in (('as stored', kinds), ('in float32', float32(kinds))):
    compact, plain = pair
    fast, slow = medians(
      functools.partial(tokens_a_second, compact, _TOKENS.value),
      functools.partial(tokens_a_second, plain, _TOKENS.value),
      _RUNS.value,
    )
    name = f'tokens per second, {stored}'
    print(f'{name:32}{fast:13.1f}{slow:14.1f}{fast / slow:9.2f}')
  for name, measure in (('shortcuts', shortcut_bytes), ('parameters', all_bytes)):
    ours, theirs = map(measure, kinds)
    name = f'bytes of {name}, as stored'
    print(f'{name:32}{ours:13,}{theirs:14,}{theirs / ours:9.2f}')
  print(
    '\nOne shortcut product, in microseconds. The last column is the ratio of the\n'
    'numbers of multiplications.\n'
    f'{"d":>6}{"k":>6}{"stored":>9}{"batch":>7}{"I - B B^T":>13}{"materialized":>14}'
    f'{"ratio":>9}{"d / 2k":>11}'
  )
  print('\n'.join(product_rows(_RUNS.value)))


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
