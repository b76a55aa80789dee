"""Orbax saves and loads files of this package, and loads snapshots."""

import asyncio
import os
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
import chex
import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import random_models

import rotbits_jax
from rotbits_jax import checkpointable
from rotbits_jax import structured

DENSE = pathlib.Path(__file__).parent / 'testdata/llama-tiny-dense'
FILE = pathlib.Path('state', 'model.rotbits')

# Saves and loads a PyTree that eight devices share.
SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import orbax.checkpoint.experimental.v1 as ocp
import rotbits_jax
from rotbits_jax import Checkpointable

mesh = jax.make_mesh((8,), ('x',))
rows, columns = (NamedSharding(mesh, PartitionSpec(*x)) for x in (['x'], [None, 'x']))
state = {'w': jax.device_put(np.arange(128.0, dtype=np.float32).reshape(8, 16), rows)}
ocp.save_checkpointables(sys.argv[1], {'state': Checkpointable(state)})

def load(like, **options):
  found = {'state': Checkpointable(like, **options)}
  w = ocp.load_checkpointables(sys.argv[1], found)['state'].value['w']
  np.testing.assert_array_equal(w, state['w'])
  return w.sharding

spec = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=columns)
assert load(state) == rows
assert load({'w': spec}) == columns
assert load(state, sharding=columns).is_equivalent_to(columns, 2)
assert load(None, sharding=columns).is_equivalent_to(columns, 2)

# Without a sharding, a model is where the committed arrays of the value are.
folder = rotbits_jax.checkpoints.example('llama-tiny-dense')
model = rotbits_jax.load_checkpoint(folder).model
spread = lambda x: jax.device_put(x, columns if x.ndim == 3 else None)
model = model.replace(params=jax.tree.map(spread, model.params))
path = sys.argv[1] + '-model'
ocp.save_checkpointables(path, {'model': Checkpointable(model)})
found = ocp.load_checkpointables(path, {'model': Checkpointable(model)})['model'].value
for x, y in zip(*map(jax.tree.leaves, (found.params, model.params)), strict=True):
  np.testing.assert_array_equal(x, y)
  assert x.committed == y.committed
  assert x.sharding.is_equivalent_to(y.sharding, x.ndim)

# Also where the file has other stacks: in that of `free` the first layer is alone.
path = sys.argv[1] + '-free'
ocp.save_checkpointables(path, {'model': Checkpointable(model, preset='free')})
found = ocp.load_checkpointables(path, {'model': Checkpointable(model)})['model'].value
assert len(found.params) > len(model.params)
for name, record in found.params.items():
  for x in jax.tree.leaves(record) if name.startswith('layers') else ():
    assert x.committed == (x.ndim == 3)
"""


class CheckpointableTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(scratch, 'checkpoint')

  def save(self, value, **options):
    state = rotbits_jax.Checkpointable(value, **options)
    ocp.save_checkpointables(self.path, {'state': state})

  def load(self, value=None, **options):
    state = rotbits_jax.Checkpointable(value, **options)
    found = ocp.load_checkpointables(self.path, {'state': state})
    self.assertIs(found['state'], state)
    return state.value

  def test_a_training_state_comes_back(self):
    params = {'w': jnp.ones((4, 3)), 'b': np.arange(3, dtype=np.float32)}
    state = {'params': params, 'opt': optax.adam(1e-3).init(params)}
    self.save(state)
    found = self.load(state)
    chex.assert_trees_all_equal(found, state)
    self.assertIsInstance(found['params']['b'], np.ndarray)
    self.assertIsInstance(found['params']['w'], jax.Array)
    chex.assert_trees_all_equal(self.load(jax.eval_shape(lambda: state)), state)
    self.assertCountEqual(self.load(), ['params', 'opt'])
    explicit = (jax.sharding.AxisType.Explicit,)
    spread = jax.NamedSharding(
      jax.make_mesh((1,), ('x',), axis_types=explicit), jax.P()
    )
    specs = jax.eval_shape(lambda: jax.device_put(state, spread))
    chex.assert_trees_all_equal(self.load(specs), state)

  def test_arrays_stay_committed_or_uncommitted(self):
    state = {'free': jnp.ones(3), 'bound': jax.device_put(1.0, jax.devices()[0])}
    self.save(state)
    found = self.load(state)
    self.assertFalse(found['free'].committed)
    self.assertTrue(found['bound'].committed)

  def test_leaves_of_integers_come_back_as_arrays(self):
    numbers, step = jnp.arange(12, dtype=jnp.int8).reshape(3, 4), jnp.float32(0.5)
    pair = structured.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))
    state = {'w': structured.UniformlyQuantized(numbers, step, 'float32'), 'x': pair}
    self.save(state)
    found = self.load(state)
    chex.assert_trees_all_equal(found, state | {'w': numbers * step})
    self.assertIsInstance(found['w'], jax.Array)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    chex.assert_trees_all_equal(self.load(state, sharding=place), found)

  def test_a_sliced_model_keeps_its_coordinates(self):
    model = random_models.sliced_llama((20, 20, 20, 20, 24))
    self.save(model)
    chex.assert_trees_all_equal(self.load(model).params, model.params)
    self.assertEqual(self.load().config, model.config)
    self.assertEqual(rotbits_jax.inspect(self.path / FILE).preset, 'exact')

  def test_the_state_is_that_of_the_call(self):
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {'jax': jnp.zeros(64), 'numpy': np.zeros(64)}
    started = mock.Mock(wraps=rotbits_jax.encode)
    with mock.patch.object(checkpointable.api, 'encode', started):
      response = ocp.save_checkpointables_async(
        self.path, {'state': rotbits_jax.Checkpointable(state)}
      )
      state['jax'] = donated(state['jax'])
      state['numpy'] += 1
      response.result()
    started.assert_called_once()
    chex.assert_trees_all_equal(
      self.load(), {'jax': np.zeros(64), 'numpy': np.zeros(64)}
    )

  def test_other_processes_copy_nothing(self):
    with (
      mock.patch.object(jax, 'process_index', return_value=1),
      mock.patch.object(jax, 'device_get', side_effect=RuntimeError('far away')),
    ):
      created = mock.Mock(await_creation=mock.AsyncMock(return_value=self.path))

      async def save():
        await (await rotbits_jax.Checkpointable({'w': jnp.ones(3)}).save(created))

      asyncio.run(save())
    self.assertFalse(self.path.exists())

  def test_the_base_is_that_of_the_call(self):
    base = {'w': np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)}
    anchor, tuned = {'w': base['w'].copy()}, {'w': base['w'] * np.float16(1.01)}
    self.path.mkdir()
    created = mock.Mock(await_creation=mock.AsyncMock(return_value=self.path))

    async def save():
      write = await rotbits_jax.Checkpointable(tuned, base=base).save(created)
      base['w'][:] = tuned['w']  # the training goes on
      await write

    asyncio.run(save())
    found = rotbits_jax.decode(self.path / FILE.name, base=anchor)
    chex.assert_trees_all_equal(found, tuned)

  def test_beside_a_base(self):
    base = {'w': np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)}
    tuned = {'w': base['w'].copy()}
    tuned['w'][0] += 1
    self.save(tuned, base=base)
    self.assertLess((self.path / FILE).stat().st_size, 4000)
    chex.assert_trees_all_equal(self.load(base, base=base), tuned)
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'give that model'):
      self.load()

  def test_files_make_it_a_checkpoint(self):
    checkpoint = rotbits_jax.load_checkpoint(DENSE)
    self.save(checkpoint.model, files=checkpoint.files)
    again = self.path.with_name('again')
    rotbits_jax.decode_to_directory(self.path / FILE, again)
    chex.assert_trees_all_equal(
      rotbits_jax.load_checkpoint(again).model.params, checkpoint.model.params
    )

  def test_damage_is_an_error(self):
    state = {'w': np.arange(64.0)}
    self.save(state)
    file = self.path / FILE
    file.write_bytes(file.read_bytes()[:-1])
    with self.assertRaisesRegex(
      rotbits_jax.ContainerError, 'model.rotbits: .* cut short'
    ):
      self.load()
    file.unlink()
    with self.assertRaises(FileNotFoundError):
      self.load()

  def test_another_structure_is_an_error(self):
    self.save({'w': np.zeros(3)})
    with self.assertRaisesRegex(ValueError, 'only one of the file and `like`'):
      self.load({'v': np.zeros(3)})

  # Orbax leaves coroutines that nothing awaits.
  @pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
  def test_a_leaf_that_cannot_be_stored_leaves_nothing(self):
    with self.assertRaisesRegex(ValueError, 'w: a key'):
      self.save({'w': jax.random.key(0)})
    self.assertFalse(self.path.exists())

  def test_shardings(self):
    program = SHARDED.replace('sys.argv[1]', repr(str(self.path)))
    devices.run(program)

  def test_a_snapshot_loads_by_name(self):
    file = self.path.with_name('file')
    rotbits_jax.encode_to_file(DENSE, file)
    with mock.patch.dict(os.environ, ROTBITS_JAX_CACHE=str(self.path)):
      folder = rotbits_jax.snapshot(file)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
      found = ocp.load(folder)
    embed = rotbits_jax.read_tensor(file, 'embed/tokens')
    np.testing.assert_array_equal(found['model.embed_tokens.weight'], embed)


if __name__ == '__main__':
  absltest.main()
