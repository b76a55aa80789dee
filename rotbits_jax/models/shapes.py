"""The shape of every parameter, from the config's sizes and the axes in `layout`."""

import math
from typing import Any

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import layout


def layer_shapes(config: config_lib.ModelConfig, layer: int) -> dict[str, Any]:
  """Returns the shapes of a layer's parameters as nested dicts; kernels `[in, out]`."""
  widths = config.layer_widths(layer)
  return _shapes(config, layout.layer_axes(config), widths)


def outer_shapes(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Returns the shapes of the parameters outside the layers, as nested dicts."""
  return _shapes(config, layout.outer_axes(config), config.segment_widths)


def count_elements(config: config_lib.ModelConfig) -> int:
  """Counts the numbers in the checkpoint of a model with this config."""
  trees = [outer_shapes(config)]
  trees += [layer_shapes(config, layer) for layer in range(config.num_layers)]
  return sum(math.prod(s) for tree in trees for s in structured.flatten(tree).values())


def _shapes(
  config: config_lib.ModelConfig, axes: layout.Axes, widths: tuple[int, ...]
) -> dict[str, Any]:
  sizes: dict[layout.Axis, int] = {
    'query': config.num_heads * config.head_dim,
    'key': config.num_kv_heads * config.head_dim,
    'neuron': config.intermediate_size,
    'vocabulary': config.vocab_size,
    'position': config.learned_positions,
    'norm': config.hidden_size,
    -1: widths[-1],
  }
  sizes |= dict(enumerate(widths))
  return structured.unflatten(
    {path: tuple(sizes[axis] for axis in own) for path, own in axes.items()}
  )
