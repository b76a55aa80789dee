"""Weight sync: a training in one process, a sampler in another, deltas between them.

  python examples/weight_sync.py FOLDER [--steps=20] [--anchor_every=8]

After each step the trainer writes what changed since the step before, and sometimes all
weights: an anchor, for samplers that come late or lose a step. The last step has one,
too. The files of a folder stand for any channel: a queue, a bucket, a broadcast. Each
delta carries checksums of the weights that it needs, so a delta that was lost, repeated
or reordered is an error. The sampler prints it, waits for the next anchor, and has the
same bits.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

import rotbits_jax


def initial_weights():
  keys = jax.random.split(jax.random.key(0), 2)
  normal = lambda key, *shape: (jax.random.normal(key, shape) / 16).astype(jnp.bfloat16)
  return {'hidden': normal(keys[0], 256, 512), 'out': normal(keys[1], 512, 16)}


def forward(weights, x):
  return jnp.tanh(x @ weights['hidden']) @ weights['out']


def digest(weights):
  leaves = map(jax.device_get, jax.tree.leaves(weights))
  return hashlib.sha256(b''.join(x.tobytes() for x in leaves)).hexdigest()[:16]


def publish(path, data):
  """Writes a file that appears when it is complete."""
  path.with_suffix('.new').write_bytes(data)
  path.with_suffix('.new').rename(path)


def train(folder, steps, anchor_every):
  x = jax.random.normal(jax.random.key(1), (512, 256), jnp.bfloat16)
  y = jnp.sin(x[:, :16])
  optimizer = optax.adam(1e-5)

  @jax.jit
  def step(weights, state):
    loss = lambda w: jnp.mean(jnp.square(forward(w, x) - y).astype(jnp.float32))
    updates, state = optimizer.update(jax.grad(loss)(weights), state)
    return optax.apply_updates(weights, updates), state

  weights = initial_weights()
  state = optimizer.init(weights)
  publish(folder / 'anchor-0.rotbits', rotbits_jax.encode(weights, preset='exact'))
  for number in range(1, steps + 1):
    new, state = step(weights, state)
    data = rotbits_jax.delta(new, weights)
    publish(folder / f'delta-{number}.rotbits', data)
    if number % anchor_every == 0 or number == steps:
      anchor = rotbits_jax.encode(new, preset='exact')
      publish(folder / f'anchor-{number}.rotbits', anchor)
    weights = new
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    print(f'step {number}: {len(data):,} bytes for {size:,}', flush=True)
  print(f'the trainer has step {steps}, {digest(weights)}', flush=True)


def numbers(folder, kind):
  return sorted(int(x.stem.split('-')[1]) for x in folder.glob(f'{kind}-*.rotbits'))


def sample(folder, steps):
  weights, number = None, -1
  x = jax.random.normal(jax.random.key(2), (4, 256), jnp.bfloat16)
  while number < steps:
    deltas = [n for n in numbers(folder, 'delta') if n > number]
    anchors = [n for n in numbers(folder, 'anchor') if n > number]
    if weights is not None and deltas:
      data = (folder / f'delta-{deltas[0]}.rotbits').read_bytes()
      try:
        # The old arrays are deleted, each when its successor is there.
        weights = rotbits_jax.apply(data, weights, donate=True)
      except ValueError as error:  # a delta was lost, repeated or reordered
        print(f'delta {deltas[0]} does not follow step {number}: {error}', flush=True)
        weights = None
        continue
      number = deltas[0]
    elif anchors:
      number = anchors[-1]
      weights = rotbits_jax.load(folder / f'anchor-{number}.rotbits')
    else:
      time.sleep(0.05)
      continue
    forward(weights, x).block_until_ready()
  print(f'the sampler has step {number}, {digest(weights)}', flush=True)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--anchor_every', type=int, default=8)
  parser.add_argument('--sampler', action='store_true')
  options = parser.parse_args()
  options.folder.mkdir(exist_ok=True)
  if options.sampler:
    sample(options.folder, options.steps)
    return 0
  if numbers(options.folder, 'anchor'):
    parser.error(f'{options.folder} has the steps of another run')
  sampler = subprocess.Popen([sys.executable, *sys.argv, '--sampler'])
  try:
    train(options.folder, options.steps, options.anchor_every)
  except BaseException:
    sampler.terminate()  # it would wait for the next step
    raise
  return sampler.wait()


if __name__ == '__main__':
  sys.exit(main())
