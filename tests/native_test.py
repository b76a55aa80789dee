"""Loops are compiled as one native function on the CPU, and as usual elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax.coding import codecs
from rotbits_jax.coding import haar
from rotbits_jax.coding import permutation
from rotbits_jax.coding import rans
from rotbits_jax.system import native


def loops_of_thunks(function, *arguments):
  """The loops of a compiled program that are run by the executor of thunks."""
  text = jax.jit(function).lower(*arguments).compile().as_text()
  entry = text[text.index('\nENTRY') :]
  return entry.count(' while(')


def doubled(x, n):
  return jax.lax.fori_loop(0, n, lambda i, x: x + x, x)
