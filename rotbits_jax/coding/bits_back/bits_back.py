r"""Bits-back coding: a codec made from a latent variable model.

To push x, the encoder first *pops* a latent z from the message with the posterior
q(z | x). Then it pushes x with the likelihood p(x | z), and z with the prior p(z). The
decoder pops z and x. It pushes z back with q(z | x), which returns the bits that the
encoder took. The message grows by

    log2 q(z | x) - log2 p(x | z) - log2 p(z)    bits,

on average the negative evidence lower bound. The bits that choose z are always bits
that the message already holds. If the message holds too few bits, it records that, and
`rans.check` says how many bits were missing.

**Symmetries.** Suppose that a group acts on y and that only the orbit of y matters.
Then x is the canonical element of the orbit, and z = y is an element of the orbit that
the encoder may choose:

    prior        the codec of y, as if there were no symmetry
    likelihood   y -> codecs.certain(canonical(y))
    posterior    x -> a codec of the elements of x's orbit, all equally probable

The message grows by the bits that y costs under the prior, minus log2 of the number of
elements in the orbit. In this way the choice of a rotation (`haar`) or of a row order
(`permutation`) costs no bits.

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
  """Returns the codec of x under the model p(z) p(x | z).

  Args:
    prior: the codec of z under p(z).
    likelihood: takes z; returns the codec of x under p(x | z).
    posterior: takes x; returns the codec of z under q(z | x).

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
