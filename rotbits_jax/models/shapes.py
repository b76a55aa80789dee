"""The shape of every parameter, from the config's sizes and the axes in `layout`."""

from collections.abc import Iterable
import math
from typing import Any

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import layout
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import names


def layer_shapes(config: config_lib.ModelConfig, layer: int) -> dict[str, Any]:
  """Returns the shapes of a layer's parameters as nested dicts; kernels `[in, out]`."""
  widths = config.layer_widths(layer)
  return _shapes(config, layout.layer_axes(config), widths)


def outer_shapes(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Returns the shapes of the parameters outside the layers, as nested dicts."""
  return _shapes(config, layout.outer_axes(config), config.segment_widths)


def record_shapes(config: config_lib.ModelConfig, record: str) -> dict[str, Any]:
  """Returns the shapes of a record, see `names`; nothing if there is no such record."""
  index = names.layer_index(record)
  if index is None:
    shapes: dict[str, Any] = outer_shapes(config).get(record, {})
    return shapes
  return layer_shapes(config, index) if index < config.num_layers else {}


def stacked_shapes(
  config: config_lib.ModelConfig, stacks: Iterable[range] | None = None
) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter of a model by path; kernels `[N, in, out]`.

  Args:
    config: sizes and switches.
    stacks: the layers of each stack, which must have equal shapes. None for the fewest
      stacks.
  """
  if stacks is None:
    key = lambda layer: layer_shapes(config, layer)
    stacks = model_lib.stack_ranges(range(config.num_layers), key)
  found = structured.flatten(outer_shapes(config))
  for stack in stacks:
    for path, shape in structured.flatten(layer_shapes(config, stack.start)).items():
      found[f'{names.stack(stack)}/{path}'] = (len(stack), *shape)
  return found


def count_elements(config: config_lib.ModelConfig) -> int:
  """Counts the elements in the checkpoint of a model with this config."""
  trees = [outer_shapes(config)]
  trees += [layer_shapes(config, layer) for layer in range(config.num_layers)]
  return sum(math.prod(s) for tree in trees for s in structured.flatten(tree).values())


def _shapes(
  config: config_lib.ModelConfig, axes: layout.Axes, widths: tuple[int, ...]
) -> dict[str, Any]:
  sizes: dict[layout.Axis, int] = {
    'query': config.num_heads * config.head_dim,
    'key': config.num_kv_heads * config.head_dim,
    'head': config.head_dim,
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
