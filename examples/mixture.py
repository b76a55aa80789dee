"""Codes data with a latent-variable model by bits-back coding, at the ideal rate.

  python examples/mixture.py

The model is a mixture of K products of D Bernoulli distributions,

    p(x) = sum_z p(z) p(x | z),    p(x | z) = prod_d p(x_d | z).

Nobody knows the component z of a point x. To choose one and send it would cost
-log2 p(z | x) bits too many; `codecs.bits_back` gets these back. The whole data set is
pushed by one `jax.lax.scan`, B points a step.

The decoder must compute the posterior to the last bit. So the logarithms are rounded to
integers once, and all else is integer arithmetic: floats propose, integers decide.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables

LANES = 16
UNIT = 64  # integers stand for logarithms in units of 1 / 64
EXPONENTIALS = np.rint(2**16 * np.exp(-np.arange(16 * UNIT) / UNIT)).astype(np.uint32)


class Mixture(NamedTuple):
  """A mixture of products of Bernoulli distributions."""

  weights: np.ndarray  # p(z), float64 [K]
  means: np.ndarray  # p(x_d = 1 | z), float64 [K, D]

  def log2_likelihood(self, x: np.ndarray) -> np.ndarray:
    """Returns log2 p(x) of points, `[..., D]`: the ideal rate with another sign."""
    given_z = x @ np.log(self.means).T + (1 - x) @ np.log(1 - self.means).T
    return np.logaddexp.reduce(given_z + np.log(self.weights), axis=-1) / np.log(2)

  def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draws points, uint16 `[*shape, D]`."""
    z = rng.choice(len(self.weights), shape, p=self.weights)
    return (rng.random((*shape, self.means.shape[1])) < self.means[z]).astype(np.uint16)


def frequencies(weights: jax.Array) -> jax.Array:
  """Returns frequencies of symbols in proportion to weights, uint32 `[K, A]`.

  Each is at least 1, and a row adds up to `tables.TOTAL`. Weights are at most 2^16.
  """
  shared = tables.TOTAL - weights.shape[1]
  counts = 1 + weights * jnp.uint32(shared) // weights.sum(axis=1, keepdims=True)
  missing = tables.TOTAL - counts.sum(axis=1)
  return counts.at[jnp.arange(len(counts)), weights.argmax(axis=1)].add(missing)


def codec(mixture: Mixture, batch: int) -> codecs.Codec:
  """Returns the codec of the coordinates of B points, uint16 `[B * D]`."""
  dimensions = mixture.means.shape[1]
  weight = np.rint(2**16 * mixture.weights).astype(np.uint32)
  ones = np.rint(2**16 * mixture.means).astype(np.uint32)
  bits = np.stack([2**16 - ones, ones], axis=-1).reshape(-1, 2)  # row z * D + d
  given_z = frequencies(jnp.asarray(bits))
  log_weight, log_one, log_zero = (
    np.rint(UNIT * np.log(p)).astype(np.int32)
    for p in (mixture.weights, mixture.means, 1 - mixture.means)
  )
  prior = codecs.categorical(
    jnp.zeros(batch, jnp.uint32), frequencies(jnp.asarray(weight[None]))
  )

  def likelihood(z: jax.Array) -> codecs.Codec:
    coordinates = jnp.arange(dimensions, dtype=jnp.uint32)
    row = z.astype(jnp.uint32)[:, None] * dimensions + coordinates
    return codecs.categorical(row.reshape(-1), given_z)

  def posterior(x: jax.Array) -> codecs.Codec:
    points = x.reshape(batch, dimensions).astype(jnp.int32)
    joint = log_weight + points @ log_one.T + (1 - points) @ log_zero.T  # [B, K]
    below = joint.max(axis=1, keepdims=True) - joint
    places = jnp.minimum(below, len(EXPONENTIALS) - 1)
    weights = jnp.asarray(EXPONENTIALS)[places]
    return codecs.categorical(jnp.arange(batch, dtype=jnp.uint32), frequencies(weights))

  return codecs.bits_back(prior, likelihood, posterior)


def main(steps: int = 64, batch: int = 64) -> float:
  """Codes points and decodes them; returns the rate relative to the ideal one."""
  rng = np.random.default_rng(0)
  means = rng.beta(0.3, 0.3, (8, 20)).clip(0.01, 0.99)
  mixture = Mixture(rng.dirichlet(np.full(8, 2.0)), means)
  points = mixture.sample(rng, (steps, batch))
  bits_back = codec(mixture, batch)
  # The first latents are sampled from words that hold other data.
  words = rng.integers(0, 1 << 16, (batch, LANES), np.uint16)
  empty = rans.stacked(jnp.asarray(words), room=points.size // LANES)

  @jax.jit
  def push(message: rans.Message, points: jax.Array) -> rans.Message:
    step = lambda message, x: (bits_back.push(message, x), None)
    return jax.lax.scan(step, message, points.reshape(steps, -1))[0]

  @jax.jit
  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    step = lambda message, _: bits_back.pop(message)
    return jax.lax.scan(step, message, length=steps)

  full = rans.check(push(empty, jnp.asarray(points)))
  left, popped = pop(full)
  if left != empty or not np.array_equal(popped[::-1].reshape(points.shape), points):
    raise ValueError('the points did not come back')
  rate = (rans.content_bits(full) - rans.content_bits(empty)) / points[..., 0].size
  ideal = -mixture.log2_likelihood(points).mean()
  print(f'{rate:.3f} bits a point; the ideal rate is {ideal:.3f}')
  return rate / ideal


if __name__ == '__main__':
  main()
