"""The coder: turns arrays of numbers into bits and back, in JAX.

The modules know neither models nor files. A message is a stack of coded symbols,
divided into lanes that are coded side by side. A frequency table says how probable each
symbol of an alphabet is. In the order of reading:

    rans         the coder: pushes symbols onto a message and pops them
    tables       integer frequency tables
    codecs       codecs, which are pairs (push, pop), and functions that combine them
    bits_back/   bits-back coding: rotations that cost no bits
    weights/     arrays of weights to a stream of bytes and back
    given        numbers whose contexts the decoder knows from elsewhere
"""

from rotbits_jax.coding import bits_back
from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding import weights
from rotbits_jax.coding.bits_back import haar

__all__ = ['bits_back', 'codecs', 'haar', 'rans', 'tables', 'weights']
