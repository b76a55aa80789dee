"""The residual stream of a model whose layers are read one by one.

A model that is too large for memory needs that of one layer, and of the residual stream
of the text.
"""

from collections.abc import Iterator, Sequence
import functools
from typing import Protocol

import jax
import numpy as np

from rotbits_jax.models import config as config_lib
from rotbits_jax.models import transformer


class Layers(Protocol):
  """A model whose layers are read one by one: a `Model`, or a checkpoint on disk."""

  @property
  def config(self) -> config_lib.ModelConfig: ...

  def outer(self) -> transformer.Params:
    """The parameters outside the layers."""

  def layer(self, index: int) -> transformer.Params:
    """The parameters of one layer, by paths within the layer."""


def streams(model: Layers, windows: Sequence[np.ndarray]) -> Iterator[list[jax.Array]]:
  """Computes the residual stream in front of each layer, and after the last one.

  Args:
    model: the model, dense or sliced; it may have structured leaves.
    windows: the tokens of a text, integers `[B, T]` each.

  Yields:
    The stream of each window, float32 `[B, T, d]`.
  """
  config = model.config
  outer = model.outer()
  xs = [_embed(outer, config, window) for window in windows]
  del outer
  yield list(xs)
  for i in range(config.num_layers):
    layer = jax.device_put(model.layer(i))
    for k, x in enumerate(xs):
      xs[k] = _layer(layer, config, x)
    del layer
    yield list(xs)


_embed = jax.jit(transformer.embed, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def _layer(
  params: transformer.Params, config: config_lib.ModelConfig, x: jax.Array
) -> jax.Array:
  with jax.default_matmul_precision('highest'):
    return transformer.layer(params, config, x).x
