"""Measures `exact`, `free` and `near` side by side, of weights quantised before or not.

No file of `free` or `near` may be larger than that of `exact`, but for a kilobyte.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from benchmarks import common
from benchmarks import quantised
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured

TITLE = 'Presets side by side'
STEPS = -10.5, -8.0, -6.5, -5.0, -4.0
QUANTISERS = {
  'int4, groups of 32': quantised.through((1, 32), quantised.integers(7), 7),
  'int4, groups of 128': quantised.through((1, 128), quantised.integers(7), 7),
  'int8, rows': quantised.QUANTISERS['int8, rows'],
}

_LEAST_WIDTH = 32
_MORE = 1000  # bytes


def through(
  model: rotbits_jax.Model, quantise: quantised.Function, dtype: type
) -> rotbits_jax.Model:
  """Quantises the matrices of a model along their inputs, and dequantises them."""

  def change(path: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if array.ndim < 2 or min(array.shape[-2:]) < _LEAST_WIDTH:
      return array.astype(dtype)
    is_table = path.startswith('embed/')
    rows = array if is_table else array.swapaxes(-1, -2)  # kernels are [in, out]
    flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
    changed: np.ndarray = quantise(flat).reshape(rows.shape).astype(dtype)
    return changed if is_table else changed.swapaxes(-1, -2)

  leaves = structured.flatten(model.params)
  params = {path: change(path, leaf) for path, leaf in leaves.items()}
  return model.replace(params=structured.unflatten(params), stored_as=None)


def subjects() -> Iterator[tuple[str, rotbits_jax.Model]]:
  """Yields models and their names; of dense ones, also quantised ones."""
  for path in sorted(common.TESTDATA.glob('*/config.json')):
    model = checkpoints.load_checkpoint(path.parent).model.rounded()
    yield path.parent.name, model
    width = model.config.hidden_size
    if model.config.sliced or width % 128:
      continue
    for name, quantise in QUANTISERS.items():
      for dtype in (ml_dtypes.bfloat16, np.float16):
        label = f'{path.parent.name}, {name}, {np.dtype(dtype).name}'
        yield label, through(model, quantise, dtype)


def run(settings: common.Settings) -> Iterator[common.Section]:
  rows = []
  for name, model in subjects():
    exact = len(rotbits_jax.encode(model, preset='exact'))
    sizes = [len(rotbits_jax.encode(model, preset='free'))]
    steps = STEPS[-2:] if settings.quick else STEPS
    sizes += [len(rotbits_jax.encode(model, preset='near', step=x)) for x in steps]
    larger = sum(size > exact + _MORE for size in sizes)
    rows.append((name, exact, *sizes, larger))
  header = 'model', '`exact`', '`free`', *(f'`near` {x:g}' for x in steps), 'larger'
  about = 'Bytes of files; how many of a row are larger than that of `exact`.'
  yield common.Section(TITLE, f'{about}\n\n{common.table(header, rows)}')
