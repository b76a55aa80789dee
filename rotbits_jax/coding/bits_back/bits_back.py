r"""Bits-back coding: a codec from a latent variable model.

To push x, a latent z is first *popped* from the message with the posterior q(z | x);
then x is pushed with the likelihood p(x | z) and z with the prior p(z). The decoder
pops z and x and pushes z back with q(z | x), which returns the bits that the encoder
took. The message grows by

    log2 q(z | x) - log2 p(x | z) - log2 p(z)    bits,

on average the negative evidence lower bound. The bits that choose z come from what the
message holds already and are never invented: a message that holds too few is marked,
and `rans.check` says how many bits were missing.

**Symmetries.** If a group acts on y and only its orbit matters, then x is the orbit's
canonical element and z = y is an element that the encoder chooses freely:

    prior        the codec of y, as if there were no symmetry
    likelihood   y -> codecs.certain(canonical(y))
    posterior    x -> the codec of the elements of x's orbit, popped uniformly

and the message grows by the size of y less log2 of the orbit's. That is how a rotation
(`haar`) or an order of rows (`permutation`) is coded for free.

References:
  J. Townsend, T. Bird, D. Barber, ICLR 2019, algorithm 1.
  J. He, G. Flamich, J. M. Hernandez-Lobato, arXiv 2410.01309.
"""

from collections.abc import Callable
from typing import Any

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans


def bits_back(
  prior: codecs.Codec,
  likelihood: Callable[[Any], codecs.Codec],
  posterior: Callable[[Any], codecs.Codec],
) -> codecs.Codec:
  """The codec of x under the model p(z) p(x | z).

  Args:
    prior: codec of z.
    likelihood: takes z and returns the codec of x.
    posterior: takes x and returns the codec of z.

  Returns:
    A codec of x.
  """

  def push(message: rans.Message, x: Any) -> rans.Message:
    message, z = posterior(x).pop(message)
    message = likelihood(z).push(message, x)
    return prior.push(message, z)

  def pop(message: rans.Message) -> tuple[rans.Message, Any]:
    message, z = prior.pop(message)
    message, x = likelihood(z).pop(message)
    return posterior(x).push(message, z), x

  return codecs.Codec(push, pop)
