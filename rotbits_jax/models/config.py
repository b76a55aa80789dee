"""The config of a transformer: its sizes and its switches.

A layer has two sublayers, attention and MLP. A segment is the part of the residual
stream between two steps that write to it: a step is a sublayer, or a whole layer where
attention and MLP run side by side. Segment 0 is the output of the embedding, and the
last segment is the input of the head. A dense model has D elements in every segment;
SliceGPT makes segments narrower.

Shape letters used throughout the package:
  D  hidden size of the dense model      d  width of a residual segment (d <= D)
  L  layers                              S  residual segments, minus one
  F  MLP width, of one expert            E  experts of an MLP
  H  query heads, K key-value heads      h  width of one head
                                         V  vocabulary
"""

import dataclasses
from typing import Annotated, Literal

import numpy as np

from rotbits_jax.system import schema

Activation = Literal['relu', 'gelu_new', 'silu']
Norm = Literal['layernorm', 'rmsnorm', 'rmsn']

Count = Annotated[int, schema.between(0, (1 << 31) - 1)]
"""The length of an axis, or a number of layers or heads."""

MOST_EXPERTS = 1 << 16
"""The greatest number of experts of all layers: a checkpoint names each of them."""

SLICED_NORM_EPS = 1e-5  # SliceGPT's RMSN ignores the epsilon of the dense config


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How RoPE's frequencies are lowered to reach beyond the trained positions.

  'linear' divides every frequency by `factor` (arXiv 2306.15595). 'llama3' (Llama
  3.1) counts the turns that a frequency makes within `original_positions` tokens. It
  divides a frequency that makes fewer than `low_freq_factor` turns by `factor`, and
  keeps a frequency that makes more than `high_freq_factor`. Between the two bounds it
  interpolates linearly in the number of turns.

  Attributes:
    type_name: 'linear' or 'llama3'.
    factor: divisor of the frequencies.
    low_freq_factor: lower bound of 'llama3', in turns.
    high_freq_factor: upper bound of 'llama3', in turns; must exceed `low_freq_factor`.
    original_positions: number of tokens within which 'llama3' counts the turns.
  """

  type_name: Literal['linear', 'llama3']
  factor: float
  low_freq_factor: float = 0.0
  high_freq_factor: float = 0.0
  original_positions: Count = 0

  def __post_init__(self) -> None:
    low, high = self.low_freq_factor, self.high_freq_factor
    if self.type_name == 'llama3' and not 0 < low < high:
      raise ValueError(
        'low_freq_factor must be positive and less than high_freq_factor, '
        f'got {low} and {high}'
      )
    _check_positive(factor=self.factor)


def _check_positive(**numbers: float | None) -> None:
  """Raises ValueError if one of these numbers is not above 0."""
  for name, number in numbers.items():
    if number is not None and not number > 0:
      raise ValueError(f'{name} must be positive, got {number}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
  """How the attention of a layer depends on the positions of tokens.

  Attributes:
    rotary_dim: how many leading coordinates of a head RoPE rotates; 0 for no RoPE.
    rope_theta: base of RoPE's wavelengths.
    rope_scaling: how RoPE's frequencies are lowered; None if they are not.
    sliding_window: how many tokens a token attends to, itself included; None for all.
  """

  rotary_dim: Count = 0
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  sliding_window: Count | None = None

  def __post_init__(self) -> None:
    _check_positive(rope_theta=self.rope_theta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Positions):
  """Sizes and switches of one dense or sliced decoder-only transformer.

  A switch stands for one thing that a family does otherwise, so that another family is
  another combination of them. `schema.load` and `schema.dump` convert a config from and
  to JSON. The attributes of `Positions` are those of the layers that are not among
  `alternate_layers`.

  Attributes:
    family: key of `checkpoints.FAMILIES`, whose row names the tensors.
    hidden_size: D; RMSN divides by D in narrower segments, too.
    intermediate_size: F.
    num_layers: L.
    num_heads: H.
    num_kv_heads: K; H is a multiple of it.
    head_dim: h.
    vocab_size: V.
    activation: activation function of the MLP.
    gated_mlp: whether the MLP is `down(act(gate(x)) * up(x))` and not
      `down(act(up(x)))`.
    num_experts: E, if the MLP of every layer is a mixture of experts; 0 if it is not.
    experts_per_token: how many experts a token takes, those with the greatest weights.
    unit_expert_weights: whether the weights of these experts are divided by their sum.
    parallel_block: whether attention and MLP run side by side: they read the same
      input and share one shortcut.
    qkv_bias: whether query, key and value have biases.
    out_bias: whether the attention's output projection has a bias.
    mlp_bias: whether the MLP's projections have biases.
    head_bias: whether the head has a bias.
    norm: 'layernorm', 'rmsnorm', or 'rmsn' for SliceGPT's norm without parameters.
    norm_eps: number that the norm adds to the mean square or to the variance.
    max_positions: length of the longest sequence that the model was trained for.
    learned_positions: rows of the position table, including the 2 unused rows at its
      start; 0 where positions are rotary.
    alternate: the positions of the `alternate_layers`; None if there are none. RoPE
      rotates as many coordinates there as in the other layers, or none.
    alternate_layers: the indices of these layers, ascending.
    qk_norm_eps: number that the RMSNorm of every query and key adds to the mean square;
      None if queries and keys have no norm.
    query_scalar: number whose root divides the scores of attention; None for h.
    attention_softcap: bound c of the scores, which become `c tanh(score / c)`; None for
      no bound.
    logit_softcap: bound of the logits in the same way.
    post_norms: whether the output of a sublayer is normed, too.
    zero_centred_scales: whether a norm multiplies by 1 + scale in place of the scale.
    scaled_embedding: whether the embedding of a token is multiplied by the root of D.
    tied_head: whether the head is the transposed embedding and is not stored.
    segment_widths: width of each residual segment, `[S + 1]`; S is 2L, or L with
      parallel blocks.
  """

  family: str
  hidden_size: Count
  intermediate_size: Count
  num_layers: Count
  num_heads: Count
  num_kv_heads: Count
  head_dim: Count
  vocab_size: Count
  activation: Activation
  gated_mlp: bool = False
  num_experts: Count = 0
  experts_per_token: Count = 0
  unit_expert_weights: bool = False
  parallel_block: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  head_bias: bool = False
  norm: Norm
  norm_eps: float
  max_positions: Count
  learned_positions: Count = 0
  alternate: Positions | None = None
  alternate_layers: tuple[Count, ...] = ()
  qk_norm_eps: float | None = None
  query_scalar: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  post_norms: bool = False
  zero_centred_scales: bool = False
  scaled_embedding: bool = False
  tied_head: bool = False
  segment_widths: tuple[Count, ...]

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_positive(
      query_scalar=self.query_scalar,
      attention_softcap=self.attention_softcap,
      logit_softcap=self.logit_softcap,
    )
    expected = self.segments_per_layer * self.num_layers + 1
    if len(self.segment_widths) != expected:
      raise ValueError(
        f'segment_widths must have {expected} entries for {self.num_layers} layers, '
        f'got {len(self.segment_widths)}'
      )
    heads, kv_heads = self.num_heads, self.num_kv_heads
    if not 0 < kv_heads <= heads or heads % kv_heads:
      raise ValueError(
        f'num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}'
      )
    if not self.rotary_dim <= self.head_dim > 0 or self.rotary_dim % 2:
      raise ValueError(
        f'rotary_dim must be even and at most head_dim, got {self.rotary_dim} and '
        f'{self.head_dim}'
      )
    if not all(0 < width <= self.hidden_size for width in self.segment_widths):
      raise ValueError(
        f'segment_widths must be from 1 to hidden_size {self.hidden_size}, '
        f'got {min(self.segment_widths)} to {max(self.segment_widths)}'
      )
    if not self.sliced and set(self.segment_widths) != {self.hidden_size}:
      raise ValueError(
        f'segments of a width other than hidden_size require norm="rmsn", '
        f'got {self.norm=}'
      )
    if self.sliced and (self.post_norms or self.zero_centred_scales):
      raise ValueError(
        'the norms after the sublayers have scales that slicing cannot move elsewhere'
      )
    if not (self.experts_per_token > 0) <= self.experts_per_token <= self.num_experts:
      raise ValueError(
        f'experts_per_token must be from 1 to num_experts {self.num_experts}, '
        f'got {self.experts_per_token}'
      )
    if self.num_experts * self.num_layers > MOST_EXPERTS:
      raise ValueError(
        f'all layers may have {MOST_EXPERTS} experts, got {self.num_layers} times '
        f'{self.num_experts}'
      )
    if self.num_experts and (self.mlp_bias or not self.gated_mlp):
      raise ValueError('experts must have a gate and no biases')
    if self.num_experts and (self.sliced or self.parallel_block):
      raise ValueError('mixtures of experts are neither sliced nor parallel blocks')
    found, ascending = self.alternate_layers, sorted(set(self.alternate_layers))
    if list(found) != ascending or any(x >= self.num_layers for x in found):
      raise ValueError(f'alternate_layers must be ascending layers, got {found}')
    if (self.alternate is None) != (not found):
      raise ValueError(f'alternate_layers need positions of their own, got {found}')
    if self.alternate and self.alternate.rotary_dim not in (0, self.rotary_dim):
      raise ValueError(
        f'rotary_dim must be {self.rotary_dim} or 0 in the alternate layers, '
        f'got {self.alternate.rotary_dim}'
      )

  def positions(self, layer: int) -> Positions:
    """Returns the positions of a layer."""
    if self.alternate is None or layer not in self.alternate_layers:
      return self
    return self.alternate

  def check_tokens(self, tokens: np.ndarray) -> None:
    """Checks that all tokens are in the vocabulary.

    Raises:
      ValueError: if a token is not.
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
    """Returns the config after SliceGPT has sliced the model to these widths."""
    return dataclasses.replace(
      self,
      norm='rmsn',
      norm_eps=SLICED_NORM_EPS,
      # The bias of the final LayerNorm becomes a bias of the head.
      head_bias=self.head_bias or self.norm == 'layernorm',
      tied_head=False,
      segment_widths=widths,
    )

  def layer_widths(self, layer: int) -> tuple[int, ...]:
    """Widths of a layer's segments: `(in, out)` if parallel, or `(in, middle, out)`."""
    step = self.segments_per_layer
    return self.segment_widths[layer * step : layer * step + step + 1]
