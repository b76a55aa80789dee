"""The axes and the shape of every parameter, and the symmetries that follow.

A symmetry is a change of coordinates that keeps the function of a model.
`models.config` defines segments.

A parameter's path is its keys joined by '/', as in 'attention/query/kernel'. Kernels
are `[in, out]`. Shape letters are those of `models.config`.
"""

from collections.abc import Mapping
import itertools
import math
from typing import Any, Literal, NamedTuple

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import names

Axis = int | Literal['query', 'key', 'head', 'neuron', 'vocabulary', 'position', 'norm']
"""The meaning of one axis of a parameter.

An integer is a residual segment. For a parameter of a layer, 0 is the layer's input and
-1 its output; 1 is the segment between attention and MLP, if there is one. For a
parameter outside the layers, 0 is the model's first segment and -1 its last. 'query' is
H heads of width h, and 'key' is K heads of width h. 'norm' is a segment whose
coordinates are scaled one by one; rotations do not commute with this scaling. 'head' is
the same for the h coordinates of every head.
"""

Axes = dict[str, tuple[Axis, ...]]

SUBLAYERS = ('attention', 'mlp')

QK_NORMS = ('attention/query_norm/scale', 'attention/key_norm/scale')


def layer_axes(config: config_lib.ModelConfig) -> Axes:
  """Returns the axes of one layer's parameters, by path."""
  between = 0 if config.parallel_block else 1
  axes: Axes = {}

  def linear(path: str, inputs: Axis, outputs: Axis, bias: bool) -> None:
    axes[f'{path}/kernel'] = (inputs, outputs)
    if bias:
      axes[f'{path}/bias'] = (outputs,)

  after = -1 if config.parallel_block else 1
  linear('attention/query', 0, 'query', config.qkv_bias)
  linear('attention/key', 0, 'key', config.qkv_bias)
  linear('attention/value', 0, 'key', config.qkv_bias)
  linear('attention/out', 'query', after, config.out_bias)
  linear('mlp/up', between, 'neuron', config.mlp_bias)
  linear('mlp/down', 'neuron', -1, config.mlp_bias)
  if config.gated_mlp:
    linear('mlp/gate', between, 'neuron', config.mlp_bias)
  if config.qk_norm_eps is not None:
    axes |= dict.fromkeys(QK_NORMS, ('head',))
  for sublayer in SUBLAYERS[: config.segments_per_layer]:
    if config.sliced:
      ends = (0, after) if sublayer == 'attention' else (between, -1)
      linear(f'{sublayer}_shortcut', *ends, bias=False)
    else:
      axes |= _norm(f'{sublayer}_norm', config)
  return axes


def outer_axes(config: config_lib.ModelConfig) -> Axes:
  """Returns the axes of the parameters outside the layers, by path."""
  axes: Axes = {'embed/tokens': ('vocabulary', 0)}
  if config.learned_positions:
    axes['embed/positions'] = ('position', 0)
  if not config.sliced:
    axes |= _norm('final_norm', config)
  if not config.tied_head:
    axes['head/kernel'] = (-1, 'vocabulary')
    if config.head_bias:
      axes['head/bias'] = ('vocabulary',)
  return axes


def _norm(name: str, config: config_lib.ModelConfig) -> Axes:
  parameters = ('scale', 'bias') if config.norm == 'layernorm' else ('scale',)
  return {f'{name}/{parameter}': ('norm',) for parameter in parameters}


def norm_of(config: config_lib.ModelConfig, sublayer: str) -> str:
  """Returns the name of the norm before a sublayer of a dense model."""
  return 'attention_norm' if config.parallel_block else f'{sublayer}_norm'


def layer_shapes(config: config_lib.ModelConfig, layer: int) -> dict[str, Any]:
  """Returns the shapes of a layer's parameters as nested dicts; kernels `[in, out]`."""
  return _shapes(config, layer_axes(config), config.layer_widths(layer))


def outer_shapes(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Returns the shapes of the parameters outside the layers, as nested dicts."""
  return _shapes(config, outer_axes(config), config.segment_widths)


def check_params(
  params: dict[str, Any], config: config_lib.ModelConfig
) -> tuple[range, ...]:
  """Checks the paths and shapes of all parameters of a model.

  Returns:
    The stacks of layers, as the ranges of their indices.

  Raises:
    ValueError: with the path of a parameter that is missing, is not one of the model,
      or has another shape.
  """
  stacks = names.stacks(params)
  if [*itertools.chain(*stacks)] != [*range(config.num_layers)]:
    raise ValueError(f'the model has {config.num_layers} layers, got {stacks=}')
  expected = structured.flatten(outer_shapes(config))
  for stack in stacks:
    for path, shape in structured.flatten(layer_shapes(config, stack.start)).items():
      expected[f'{names.stack(stack)}/{path}'] = len(stack), *shape
  got = {path: leaf.shape for path, leaf in structured.flatten(params).items()}
  for path in sorted(expected | got):
    if got.get(path) != expected.get(path):
      raise ValueError(
        f'the parameter {path} must have the shape {expected.get(path)}, got '
        f'{got.get(path)}'
      )
  return stacks


def check_shapes(
  config: config_lib.ModelConfig, record: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Checks the shapes, by path, of the parameters of a record; a ValueError if not."""
  index, segment = names.layer_index(record), names.subspace_index(record)
  if record == names.BUFFERS:
    if wrong := [x for x in shapes if x.split('/')[:-1] != [record]]:
      raise ValueError(f'{wrong[0]}: not the path of a buffer')
    return
  if segment is None:
    tree = outer_shapes(config).get(record, {})
    if index is not None and index < config.num_layers:
      tree = layer_shapes(config, index)
    expected = structured.flatten({record: tree})
  else:
    widths = config.segment_widths[segment : segment + 1]
    expected = {names.basis(segment): (config.hidden_size, x) for x in widths}
  if not expected:
    raise ValueError(f'{record}: a model with this config has no such record')
  is_identity = segment is not None and not shapes  # which has no basis
  if shapes != expected and not is_identity:
    path, shape = min(set(shapes.items()) ^ set(expected.items()))
    raise ValueError(f'{path}: the config implies another shape, got {shape=}')


def count_elements(config: config_lib.ModelConfig) -> int:
  """Counts the elements in the checkpoint of a model with this config."""
  trees = [outer_shapes(config)]
  trees += [layer_shapes(config, layer) for layer in range(config.num_layers)]
  return sum(math.prod(s) for tree in trees for s in structured.flatten(tree).values())


def _shapes(
  config: config_lib.ModelConfig, axes: Axes, widths: tuple[int, ...]
) -> dict[str, Any]:
  """Returns the shapes of parameters with these axes, as nested dicts."""
  sizes: dict[Axis, int] = {
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
    {path: tuple(sizes[axis] for axis in named) for path, named in axes.items()}
  )


class Symmetries(NamedTuple):
  """The symmetries of a model: which changes of coordinates keep its function."""

  segments: bool = False  # a rotation of each segment of the residual stream
  # One rotation of all segments, if the scales of norms are first folded into the
  # kernels that read the norms.
  stream: bool = False
  values: bool = False  # GL(h) between value and output of every key-value head
  # GL between query and key of every key-value head, on the coordinates that RoPE does
  # not rotate. (On each plane that it rotates, a complex factor acts.)
  queries: bool = False
  key_bias: bool = False  # whether the key bias changes no output


def symmetries(config: config_lib.ModelConfig) -> Symmetries:
  """Returns the symmetries of a model."""
  normed = config.qk_norm_eps is not None
  return Symmetries(
    segments=config.sliced and not config.tied_head,
    stream=config.norm == 'rmsnorm' and not config.tied_head,
    values=True,
    queries=not normed,
    key_bias=not (config.rotary_dim or normed),
  )
