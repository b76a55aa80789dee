"""Bytes of bfloat16 matrices that were quantised and dequantised, by several tools.

The weights of all-MiniLM-L6-v2 go through each quantiser and back to bfloat16, as by a
script that makes a checkpoint of floats for a trainer. Other tools store floats.
"""

from collections.abc import Callable, Iterator
import pathlib
import tempfile

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

from benchmarks import common
import rotbits_jax

TITLE = 'Weights that were quantised before'
PEERS = 'zstd', 'zipnn', 'lmzip'
RUNS = 5

F32, E4M3, E2M1 = np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn

Function = Callable[[np.ndarray], np.ndarray]


def rounded(dtype: type) -> Function:
  return lambda x: x.astype(dtype).astype(F32)


def integers(most: int) -> Function:
  return lambda x: np.clip(np.rint(x), -most, most) + F32(0)  # without -0


def through(
  block: tuple[int, int], grid: Function, most: float, scale: Function | None = None
) -> Function:
  """Makes a quantiser: a scale for each block, 0 for a whole axis, and a grid.

  The scale takes the greatest element of a block to `most`; `scale` rounds it.
  """

  def quantise(array: np.ndarray) -> np.ndarray:
    rows, columns = (m or n for m, n in zip(block, array.shape, strict=True))
    shape = array.shape[0] // rows, rows, array.shape[1] // columns, columns
    blocks = array.reshape(shape)
    scales = np.abs(blocks).max(axis=(1, 3), keepdims=True) / F32(most)
    scales = np.where(scales > 0, scales if scale is None else scale(scales), 1)
    return (grid(blocks / scales) * scales).reshape(array.shape)

  return quantise


def two_scales(scales: np.ndarray) -> np.ndarray:
  """Rounds scales to float8 numbers times the float32 of the whole tensor."""
  factor = scales.max() / F32(448)
  return rounded(E4M3)(scales / factor) * factor


def q4_1(array: np.ndarray) -> np.ndarray:
  """Quantises groups of 32 to 0 to 15 above a minimum, as GGUF's Q4_1 does."""
  groups = array.reshape(-1, 32)
  least, most = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
  scales, least = map(rounded(np.float16), ((most - least) / F32(15), least))
  codes = np.clip(np.rint((groups - least) / scales), 0, 15)
  return (codes * scales + least).reshape(array.shape)


FLOATS4 = lambda x: rounded(E2M1)(np.clip(x, -6, 6))
QUANTISERS: dict[str, Function] = {
  'int8, rows': through((1, 0), integers(127), 127),
  'float8_e4m3fn, blocks of 128 x 128': through((128, 128), rounded(E4M3), 448),
  'float8_e4m3fn, a tensor': through((0, 0), rounded(E4M3), 448),
  'int4, groups of 128': through((1, 128), integers(7), 7),
  'int4, groups of 32, bfloat16 scales': through(
    (1, 32), integers(7), 7, rounded(ml_dtypes.bfloat16)
  ),
  'Q4_1, groups of 32, float16 scales and minima': q4_1,
  'NVFP4': through((1, 16), FLOATS4, 6, two_scales),
  'MXFP4': through((1, 32), FLOATS4, 4, lambda x: np.exp2(np.floor(np.log2(x)))),
  'none': lambda array: array,
}


def run(settings: common.Settings) -> Iterator[common.Section]:
  weights = common.read_tensors(common.packaged_weights(common.BASE), 'float32')
  matrices = {k: x for k, x in weights.items() if x.ndim == 2 and 'layer.' in k}
  elements = sum(x.size for x in matrices.values())
  # The time of small ones is that of calls.
  large = np.concatenate([x for x in matrices.values() if x.shape[1] == 384])
  peers = PEERS if settings.peers_python else ()
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, 'model', 'model.safetensors')
    source.parent.mkdir()
    packed = pathlib.Path(folder, 'packed')
    for name, quantise in QUANTISERS.items():
      for arrays in ({'large': large}, matrices):
        tensors = {k: quantise(x).astype(ml_dtypes.bfloat16) for k, x in arrays.items()}
        safetensors_numpy.save_file(tensors, source)
        rotbits_jax.encode_to_file(source, packed, overwrite=True)
        if arrays is not matrices:
          seconds = common.median_seconds(lambda: rotbits_jax.load(packed), RUNS)
      notes = rotbits_jax.inspect(packed).notes.get('quantised before', [])
      sizes = [packed.stat().st_size]
      for peer in peers:
        python = str(settings.peers_python)
        common.run_peer(python, peer, 'compress', source, packed)
        sizes.append(packed.stat().st_size)
      bits = [f'{8 * x / elements:.2f}' for x in sizes]
      found = f'{len(notes)} of {len(tensors)}'
      rows.append((name, found, f'{1e9 * seconds / large.size:.1f}', *bits))
  header = 'quantiser', 'codes found', 'decode ns', '`exact`', *peers
  about = (
    'Bits per weight of the matrices in the layers of all-MiniLM-L6-v2, quantised and '
    'dequantised to bfloat16, without loss; and nanoseconds per weight to decode '
    f'`exact`, for one of {large.size:,} weights. Scales are float32 unless named.'
  )
  yield common.Section(TITLE, f'{about}\n\n{common.table(header, rows)}')
