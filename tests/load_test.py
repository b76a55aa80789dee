"""Readers side by side, shardings, and arrays that own their memory."""

from concurrent import futures
import subprocess
import sys

import jax
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.system import host
from tests import devices

TREE = {
  f'record {i}': {
    'x': np.random.default_rng(i).normal(size=(64, 80)).astype(np.float16)
  }
  for i in range(4)
}


def test_sixteen_readers_at_once(tmp_path):
  rotbits_jax.encode_to_file(TREE, tmp_path / 'x')
  with futures.ThreadPoolExecutor(16) as pool:
    for tree in pool.map(rotbits_jax.decode, [tmp_path / 'x'] * 16):
      assert structured.same_bits(tree, TREE)


def test_a_signalling_nan_is_converted():
  data = rotbits_jax.encode({'x': np.uint16([0x7C01]).view(np.float16)})
  assert np.isnan(rotbits_jax.load(data, dtype='bfloat16')['x']).all()


def test_a_child_of_a_fork_does_not_hang():
  program = (
    'import os, numpy as np, rotbits_jax\n'
    'encode = lambda: rotbits_jax.encode({"x": np.ones(9)})\n'
    'encode()\n'
    'if not os.fork():\n'
    '  try:\n'
    '    encode()\n'
    '  except RuntimeError as error:\n'  # JAX would hang at the end of the child
    '    os._exit(9 if "does not work after a fork" in str(error) else 1)\n'
    'os._exit(os.waitstatus_to_exitcode(os.wait()[1]))\n'
  )
  child = [sys.executable, '-W', 'ignore', '-c', program]
  assert subprocess.run(child, timeout=300).returncode == 9


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere memory is not kept')
def test_large_arrays_get_the_memory_of_earlier_ones_that_nothing_uses():
  make = lambda: host.empty((3, 1 << 20), np.uint16)
  view = jax.device_put(make())
  address = view.unsafe_buffer_pointer()
  assert make().ctypes.data != address
  del view
  assert make().ctypes.data == address


@pytest.mark.parametrize('is_path', [True, False])
def test_decoded_arrays_own_their_memory(tmp_path, is_path):
  data = bytearray(rotbits_jax.encode(TREE))
  (tmp_path / 'x').write_bytes(data)
  tree = rotbits_jax.decode(tmp_path / 'x' if is_path else data)
  (tmp_path / 'x').write_bytes(bytes(len(data)))
  data[:] = bytes(len(data))
  assert structured.same_bits(tree, TREE)
  for array in jax.tree.leaves(tree):
    array[0, 0] += 1
  assert not structured.same_bits(tree, TREE)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_layers_go_where_a_sharding_says(tmp_path, kind):
  path, source = str(tmp_path / 'x'), checkpoints.example('opt-small-sliced-0.2')
  rotbits_jax.encode_to_file(source, path, preset='free')
  devices.run(
    'import jax, numpy as np, rotbits_jax\n'
    'from jax.sharding import NamedSharding, PartitionSpec as P\n'
    f'kinds = (jax.sharding.AxisType.{kind},)\n'
    'mesh = jax.make_mesh((2,), ("layers",), axis_types=kinds)\n'
    'spread, everywhere = NamedSharding(mesh, P("layers")), NamedSharding(mesh, P())\n'
    f'model = rotbits_jax.load({path!r}, sharding=spread)\n'
    'for stack, expected in (("layers.0:1", everywhere), ("layers.1:3", spread)):\n'
    '  kernel = model.params[stack]["attention"]["query"]["kernel"]\n'
    '  assert kernel.sharding.is_equivalent_to(expected, kernel.ndim)\n'
    '  assert kernel.sharding.mesh.axis_types == kinds\n'
    f'plain, tokens = rotbits_jax.load({path!r}), np.arange(6)[None]\n'
    'logits = jax.jit(rotbits_jax.models.logits)\n'
    'expected = logits(plain, tokens)\n'
    'with jax.set_mesh(mesh):\n'
    '  actual = logits(jax.device_put(model, everywhere), tokens)\n'
    'np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-4)\n',
    devices=2,
  )
