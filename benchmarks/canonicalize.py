"""Times canonical weights in one call, and the encoder's way, layer by layer."""

from collections.abc import Callable, Iterator
import pathlib
import tempfile
import time
from typing import Any

import jax

from benchmarks import common
from benchmarks import synthetic
import rotbits_jax
from rotbits_jax import passes

TITLE = 'Canonical weights in one call'
WIDTH, LAYERS, RUNS = 256, 16, 5


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'llama')
    synthetic.write(path, synthetic.llama(WIDTH, LAYERS))
    model = rotbits_jax.load_checkpoint(path).model
  on_device = jax.device_put(model.params)
  canonicalize = jax.jit(rotbits_jax.canonicalize, static_argnums=1)
  chain = (
    passes.remove_residual_gauge(),
    passes.remove_head_gauges(),
  )
  ways: dict[str, Callable[[], Any]] = {
    'one call': lambda: canonicalize(on_device, model.config)[0],
    'layer by layer': lambda: passes.run_chain(chain, model)[0].params,
  }
  rows = []
  for name, way in ways.items():
    start = time.perf_counter()
    jax.block_until_ready(way())
    first = time.perf_counter() - start
    rows.append((name, f'{first:.2f}', f'{common.median_seconds(way, RUNS):.2f}'))
  about = (
    '`jit(canonicalize)`, and the chain of `passes` of the encoder, on a sliced Llama '
    f'of random weights: {LAYERS} layers of width {WIDTH}. The first run compiles.'
  )
  table = common.table(('', 'first run, s', 'later runs, s'), rows)
  yield common.Section(TITLE, f'{about}\n\n{table}')
