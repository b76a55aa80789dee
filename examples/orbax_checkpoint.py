"""Saves a training state with Orbax as a file of this package, and loads it.

  python examples/orbax_checkpoint.py

Orbax makes the directory, and gives it its name when it is complete. It has one file in
it, which any function of the package reads.
"""

import asyncio
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

import rotbits_jax

NAME = 'state.rotbits'


class Checkpointable:
  """Orbax v1's `StatefulCheckpointable` around a PyTree of arrays.

  For loading, `value` gives the structure; afterwards it is the loaded PyTree.
  """

  def __init__(self, value: Any):
    self.value = value

  async def save(self, directory: Any) -> Any:
    # A copy, because the program may donate or change its arrays when this returns.
    state = jax.tree.map(np.array, jax.device_get(self.value))

    async def write() -> None:
      folder = await directory.await_creation()
      await asyncio.to_thread(rotbits_jax.encode_to_file, state, folder / NAME)

    return write()

  async def load(self, directory: Any) -> Any:
    like = self.value
    self.value = await asyncio.to_thread(
      rotbits_jax.decode, directory / NAME, like=like
    )
    return asyncio.sleep(0)


def main() -> None:
  state = {'w': jnp.ones((64, 64)), 'step': jnp.int32(3)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'checkpoint')
    ocp.save_checkpointables(path, {'state': Checkpointable(state)})
    found = ocp.load_checkpointables(path, {'state': Checkpointable(state)})
  np.testing.assert_array_equal(found['state'].value['w'], state['w'])
  print('the state came back')


if __name__ == '__main__':
  main()
