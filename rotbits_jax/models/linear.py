"""Linear layers, whose kernel may be a structured leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.models import model as model_lib


def apply(params: model_lib.Params, x: jax.Array) -> jax.Array:
  """Computes `x @ kernel`, plus the bias if there is one."""
  kernel = params['kernel']
  y = kernel.apply(x) if structured.is_structured(kernel) else x @ float32(kernel)
  return y + float32(params['bias']) if 'bias' in params else y


def float32(leaf: Any) -> jax.Array:
  """Returns a parameter as a float32 array.

  A structured leaf is materialized in float32, because its own dtype is coarser.
  """
  if structured.is_structured(leaf):
    leaf = leaf.astype(jnp.float32).materialize()
  return jnp.asarray(leaf, jnp.float32)
