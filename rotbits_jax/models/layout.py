"""What the axes of every parameter stand for, and the symmetries that follow.

Everything else in the package asks here: who reads and writes which segment of the
residual stream, where the neurons and the heads are, and which changes of coordinates
leave the function of a model as it is.

A parameter's path is its keys joined by '/', as in 'attention/query/kernel'. Kernels
are `[in, out]`. Shape letters are those of `models.config`.
"""

import dataclasses
from typing import Literal, NamedTuple

from rotbits_jax.models import config as config_lib

Axis = int | Literal['query', 'key', 'neuron', 'vocabulary', 'position', 'norm']
"""An axis of a parameter.

An integer is a residual segment: of a layer 0 is its input, and -1 its output; outside
the layers 0 is the model's first segment and -1 its last. 'query' are H heads of h
numbers, 'key' are K heads of h numbers. 'norm' is a segment that is scaled number by
number, which no rotation of the segment can pass.
"""

Axes = dict[str, tuple[Axis, ...]]

SUBLAYERS = ('attention', 'mlp')


def layer_axes(config: config_lib.ModelConfig) -> Axes:
  """The axes of one layer's parameters, by path."""
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
  for sublayer in SUBLAYERS[: config.segments_per_layer]:
    if config.sliced:
      ends = (0, after) if sublayer == 'attention' else (between, -1)
      linear(f'{sublayer}_shortcut', *ends, bias=False)
    else:
      axes |= _norm(f'{sublayer}_norm', config)
  return axes


def outer_axes(config: config_lib.ModelConfig) -> Axes:
  """The axes of the parameters outside the layers, by path."""
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
  kinds = ('scale', 'bias') if config.norm == 'layernorm' else ('scale',)
  return {f'{name}/{kind}': ('norm',) for kind in kinds}


class Linear(NamedTuple):
  """The segments that a linear layer of a sublayer reads and writes; None for none."""

  reads: int | None
  writes: int | None


def linears(config: config_lib.ModelConfig) -> dict[str, Linear]:
  """The linear layers of both sublayers, by path, as in 'attention/query'."""
  segment = lambda axis: axis if isinstance(axis, int) else None
  return {
    path.removesuffix('/kernel'): Linear(segment(axes[0]), segment(axes[-1]))
    for path, axes in layer_axes(config).items()
    if path.endswith('/kernel') and path.split('/')[0] in SUBLAYERS
  }


def neuron_axes(config: config_lib.ModelConfig) -> dict[str, int]:
  """The axis that has a layer's MLP neurons, of each parameter that has one."""
  return {
    path: axes.index('neuron')
    for path, axes in layer_axes(config).items()
    if 'neuron' in axes
  }


def norm_of(config: config_lib.ModelConfig, sublayer: str) -> str:
  """The norm that a sublayer of a dense model reads."""
  return 'attention_norm' if config.parallel_block else f'{sublayer}_norm'


class Symmetries(NamedTuple):
  """The changes of a model's coordinates that its config leaves valid.

  Attributes:
    segments: every segment of the residual stream can be rotated by itself.
    stream: all segments can be rotated by one rotation, once the scales of the norms
      are folded into the kernels that read them.
    values: GL(h) acts between value and output of every key-value head.
    queries: GL acts between query and key of every key-value head, on the numbers that
      RoPE does not turn, and a complex factor on each plane that it turns.
    key_bias: the bias of keys changes no output, but in the numbers that RoPE turns.
    neurons: the neurons of an MLP can be put in any order.
  """

  segments: bool = False
  stream: bool = False
  values: bool = False
  queries: bool = False
  key_bias: bool = False
  neurons: bool = False


# The fields whose meaning `symmetries` knows. A config with a field beyond these may
# compute something that a symmetry does not keep, so it has none until that is checked.
_UNDERSTOOD = frozenset([
  'family', 'hidden_size', 'intermediate_size', 'num_layers', 'num_heads',
  'num_kv_heads', 'head_dim', 'vocab_size', 'activation', 'gated_mlp',
  'parallel_block', 'qkv_bias', 'out_bias', 'mlp_bias', 'head_bias', 'norm', 'norm_eps',
  'max_positions', 'learned_positions', 'rotary_dim', 'rope_theta', 'rope_scaling',
  'sliding_window', 'tied_head', 'segment_widths',
])  # fmt: skip
_NORMS = ('layernorm', 'rmsnorm', 'rmsn')
_POINTWISE = ('relu', 'gelu_new', 'silu')


def symmetries(config: config_lib.ModelConfig) -> Symmetries:
  """The symmetries of a model with this config.

  A switch that this function does not know makes no symmetry valid.
  """
  fields = {field.name for field in dataclasses.fields(config)}
  if fields != _UNDERSTOOD or config.norm not in _NORMS:
    return Symmetries()
  return Symmetries(
    segments=config.sliced and not config.tied_head,
    stream=config.norm == 'rmsnorm' and not config.tied_head,
    values=True,
    queries=True,
    key_bias=not config.rotary_dim,
    neurons=config.activation in _POINTWISE,
  )
