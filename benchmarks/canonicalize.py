"""Times canonical weights in one call beside the way of the encoder, layer by layer.

    python -m benchmarks.canonicalize [--width=256] [--layers=16] [--results=RESULTS.md]

The model is a sliced Llama of random weights: all segments have three quarters of the
width, and shortcuts are blocks of orthogonal matrices. *One call* is
`jax.jit(canonicalize)` on the stacked layers. *Layer by layer* is a chain of the same
transforms, which are `passes`; it also rounds the weights to float16 and measures the
error of each. The first run compiles. The second column is the median of later runs.
"""

import statistics
import sys
import time
from typing import Any

from absl import flags
import jax
import numpy as np

from benchmarks import sections
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_WIDTH = flags.DEFINE_integer('width', 256, 'Hidden size.', 64, flag_values=FLAGS)
_LAYERS = flags.DEFINE_integer('layers', 16, 'Number of layers.', 1, flag_values=FLAGS)
_RUNS = flags.DEFINE_integer('runs', 5, 'Number of timed runs.', 1, flag_values=FLAGS)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file of results to write the section to.', flag_values=FLAGS
)


def sliced_llama(width: int, layers: int) -> models.Model:
  """Makes a sliced model of random float16 weights."""
  rng = np.random.default_rng(0)
  segment = width * 3 // 4
  config = checkpoints.parse_config(
    {
      'model_type': 'llama',
      'hidden_size': width,
      'intermediate_size': 8 * width // 3,
      'num_attention_heads': width // 64,
      'num_hidden_layers': layers,
      'vocab_size': 1024,
    },
    None,
  ).sliced_to((segment,) * (2 * layers + 1))

  def leaf(path: Any, shape: tuple[int, ...]) -> np.ndarray:
    if 'shortcut' not in path[0].key:
      return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float16)
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return rotation[:segment, :segment].astype(np.float16)

  make = lambda shapes: jax.tree_util.tree_map_with_path(
    leaf, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  made = [make(models.layer_shapes(config, i)) for i in range(layers)]
  return models.from_layers(config, make(models.outer_shapes(config)), made)


def _seconds(run: Any, runs: int) -> tuple[float, float]:
  seconds = []
  for _ in range(1 + runs):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return seconds[0], statistics.median(seconds[1:])


def main() -> None:
  model = sliced_llama(_WIDTH.value, _LAYERS.value)
  function = jax.jit(rotbits_jax.canonicalize, static_argnums=1)
  chain = passes.chain(
    passes.remove_residual_gauge(),
    passes.remove_biases(),
    passes.remove_value_gauge(),
    passes.remove_query_key_gauge(),
  )
  on_device = jax.device_put(model.params)
  ways = {
    'one call': lambda: function(on_device, model.config),
    'layer by layer': lambda: passes.run_chain(chain.transforms, model)[0].params,
  }
  lines = [f'{"seconds":16}{"first":>8}{"later":>8}']
  for name, run in ways.items():
    first, later = _seconds(run, _RUNS.value)
    lines.append(f'{name:16}{first:8.2f}{later:8.3f}')
  print('\n'.join(lines))
  if _RESULTS.value is not None:
    about = (
      f'`python -m benchmarks.canonicalize --width={_WIDTH.value} '
      f'--layers={_LAYERS.value}`, {sections.machine()}.'
    )
    body = sections.with_table(about, '\n'.join(lines))
    sections.write(_RESULTS.value, 'Canonical weights in one call', body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
