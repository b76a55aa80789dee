"""What a transformer is: sizes, switches, and the shape of every parameter.

Shape letters used throughout the package:
  D  hidden size of the dense model      d  width of a residual segment (d <= D)
  L  layers                              S  residual segments less one
  F  MLP width                           V  vocabulary
  H  query heads, K key-value heads      h  width of one head
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

import jax
import numpy as np

Activation = Literal['relu', 'gelu_new', 'silu']
Norm = Literal['layernorm', 'rmsnorm', 'rmsn']

SLICED_NORM_EPS = 1e-5  # SliceGPT's RMSN, whatever the dense config says


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How RoPE's frequencies are lowered to reach beyond the trained positions.

  'linear' divides every frequency by `factor` (arXiv 2306.15595). 'llama3' (Llama
  3.1) divides those that make fewer than `low_freq_factor` turns within
  `original_positions` tokens and keeps those that make more than `high_freq_factor`;
  in between it goes over from one to the other linearly in the turns.

  Attributes:
    kind: 'linear' or 'llama3'.
    factor: divisor of the frequencies.
    low_freq_factor: turns, of 'llama3'.
    high_freq_factor: turns, of 'llama3'; more than `low_freq_factor`.
    original_positions: tokens, of 'llama3'.
  """

  kind: Literal['linear', 'llama3']
  factor: float
  low_freq_factor: float = 0.0
  high_freq_factor: float = 0.0
  original_positions: int = 0

  def __post_init__(self) -> None:
    if self.kind == 'llama3' and not self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        'low_freq_factor must be less than high_freq_factor, '
        f'got {self.low_freq_factor} and {self.high_freq_factor}'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and switches of one dense or sliced decoder-only transformer.

  Attributes:
    family: row of `checkpoints.FAMILIES` that names the tensors.
    hidden_size: D; RMSN divides by it, whatever the segment's width.
    intermediate_size: F.
    num_layers: L.
    num_heads: H.
    num_kv_heads: K; H is a multiple of it.
    head_dim: h.
    vocab_size: V.
    activation: of the MLP.
    gated_mlp: `down(act(gate(x)) * up(x))` in place of `down(act(up(x)))`.
    parallel_block: attention and MLP read the same input and share one shortcut.
    qkv_bias: query, key and value have biases.
    out_bias: the attention's output projection has a bias.
    mlp_bias: the MLP's projections have biases.
    head_bias: the head has a bias.
    norm: 'rmsn' is SliceGPT's fused norm, which has no parameters.
    norm_eps: added to the mean square (or the variance).
    max_positions: the longest sequence the model was trained for.
    learned_positions: rows of the position table, the offset of 2 included; 0
      where positions are rotary.
    rotary_dim: leading numbers of a head that RoPE turns; 0 for no RoPE.
    rope_theta: base of RoPE's wavelengths.
    rope_scaling: how its frequencies are lowered; None for not at all.
    sliding_window: tokens that attention sees, itself included; None for all.
    tied_head: the head is the transposed embedding and is not stored.
    segment_widths: width of each residual segment, `[S + 1]`; S is 2L, or L
      with parallel blocks.
  """

  family: str
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int
  activation: Activation
  gated_mlp: bool
  parallel_block: bool
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  head_bias: bool
  norm: Norm
  norm_eps: float
  max_positions: int
  learned_positions: int
  rotary_dim: int
  rope_theta: float
  rope_scaling: RopeScaling | None = None
  sliding_window: int | None
  tied_head: bool
  segment_widths: tuple[int, ...]

  def __post_init__(self) -> None:
    expected = self.segments_per_layer * self.num_layers + 1
    if len(self.segment_widths) != expected:
      raise ValueError(
        f'{self.num_layers} layers have {expected} residual segments, '
        f'got {len(self.segment_widths)} widths'
      )
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads must be a multiple of num_kv_heads, '
        f'got {self.num_heads} and {self.num_kv_heads}'
      )
    if not self.sliced and set(self.segment_widths) != {self.hidden_size}:
      raise ValueError(
        f'only a model with norm="rmsn" has sliced segments, got {self.norm=}'
      )

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> 'ModelConfig':
    """The inverse of `dataclasses.asdict`, also after a way through JSON."""
    scaling = fields.get('rope_scaling')
    nested = {
      'segment_widths': tuple(fields['segment_widths']),
      'rope_scaling': None if scaling is None else RopeScaling(**scaling),
    }
    return cls(**{**fields, **nested})

  def check_tokens(self, tokens: np.ndarray) -> None:
    """Refuses tokens outside the vocabulary.

    Raises:
      ValueError: if there is one.
    """
    outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
    if outside.size:
      raise ValueError(
        f"token {outside[0]} is outside the model's vocabulary of {self.vocab_size}"
      )

  @property
  def sliced(self) -> bool:
    """Whether the norms are fused and the residual stream has shortcuts."""
    return self.norm == 'rmsn'

  @property
  def segments_per_layer(self) -> int:
    return 1 if self.parallel_block else 2

  def sliced_to(self, widths: tuple[int, ...]) -> 'ModelConfig':
    """The model after SliceGPT fused its norms, with segments of these widths."""
    return dataclasses.replace(
      self,
      norm='rmsn',
      norm_eps=SLICED_NORM_EPS,
      # What LayerNorm's bias adds to the logits.
      head_bias=self.head_bias or self.norm == 'layernorm',
      tied_head=False,
      segment_widths=widths,
    )

  def layer_widths(self, layer: int) -> tuple[int, ...]:
    """Widths a layer touches: `(in, out)` if parallel, else `(in, middle, out)`."""
    step = self.segments_per_layer
    return self.segment_widths[layer * step : layer * step + step + 1]


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, Any]:
  """Shapes of one layer's parameters; kernels are `[in, out]`."""
  widths = config.layer_widths(layer)
  attention_in, attention_out = widths[0], widths[1]
  mlp_in, mlp_out = (widths[0] if config.parallel_block else widths[1]), widths[-1]
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim

  def linear(inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {'kernel': (inputs, outputs)} | ({'bias': (outputs,)} if bias else {})

  shapes: dict[str, Any] = {
    'attention': {
      'query': linear(attention_in, queries, config.qkv_bias),
      'key': linear(attention_in, keys, config.qkv_bias),
      'value': linear(attention_in, keys, config.qkv_bias),
      'out': linear(queries, attention_out, config.out_bias),
    },
    'mlp': {
      'up': linear(mlp_in, config.intermediate_size, config.mlp_bias),
      'down': linear(config.intermediate_size, mlp_out, config.mlp_bias),
    },
  }
  if config.gated_mlp:
    shapes['mlp']['gate'] = linear(mlp_in, config.intermediate_size, config.mlp_bias)
  if config.sliced:
    shapes['attention_shortcut'] = {'kernel': (attention_in, attention_out)}
    if not config.parallel_block:
      shapes['mlp_shortcut'] = {'kernel': (mlp_in, mlp_out)}
  else:
    shapes['attention_norm'] = norm_shapes(config)
    if not config.parallel_block:
      shapes['mlp_norm'] = norm_shapes(config)
  return shapes


def outer_shapes(config: ModelConfig) -> dict[str, Any]:
  """Shapes of the parameters outside the layers."""
  first, last = config.segment_widths[0], config.segment_widths[-1]
  shapes: dict[str, Any] = {'embed': {'tokens': (config.vocab_size, first)}}
  if config.learned_positions:
    shapes['embed']['positions'] = (config.learned_positions, first)
  if not config.sliced:
    shapes['final_norm'] = norm_shapes(config)
  if not config.tied_head:
    shapes['head'] = {'kernel': (last, config.vocab_size)}
    if config.head_bias:
      shapes['head']['bias'] = (config.vocab_size,)
  return shapes


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of a dense model's norm."""
  names = ('scale', 'bias') if config.norm == 'layernorm' else ('scale',)
  return dict.fromkeys(names, (config.hidden_size,))


def count_numbers(config: ModelConfig) -> int:
  """How many numbers the checkpoint of a model with this config holds."""
  trees = [outer_shapes(config)]
  trees += [layer_shapes(config, layer) for layer in range(config.num_layers)]
  leaves = jax.tree.leaves(trees, is_leaf=lambda x: isinstance(x, tuple))
  total = 0
  for shape in leaves:
    size = 1
    for n in shape:
      size *= n
    total += size
  return total
