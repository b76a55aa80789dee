"""The config of a transformer: its sizes and its switches.

A layer has two sublayers, attention and MLP. A segment is the part of the residual
stream between two steps that write to it: a step is a sublayer, or a whole layer where
attention and MLP run side by side. Segment 0 is the output of the embedding, and the
last segment is the input of the head. A dense model has D elements in every segment;
SliceGPT makes segments narrower.

Shape letters used throughout the package:
  D  hidden size of the dense model      d  width of a residual segment (d <= D)
  L  layers                              S  residual segments, minus one
  F  MLP width                           V  vocabulary
  H  query heads, K key-value heads      h  width of one head
"""

from typing import Annotated, Literal

import msgspec
import numpy as np

from rotbits_jax.system import schema

Activation = Literal['relu', 'gelu_new', 'silu']
Norm = Literal['layernorm', 'rmsnorm', 'rmsn']

Count = Annotated[int, schema.between(0, (1 << 31) - 1)]
"""The length of an axis, or a number of layers or heads."""

Positive = Annotated[float, msgspec.Meta(gt=0)]

SLICED_NORM_EPS = 1e-5  # SliceGPT's RMSN ignores the epsilon of the dense config


class RopeScaling(schema.Object, kw_only=True):
  """How RoPE's frequencies are lowered to reach beyond the trained positions.

  'linear' divides every frequency by `factor` (arXiv 2306.15595). 'llama3' (Llama
  3.1) counts the turns that a frequency makes within `original_positions` tokens. It
  divides a frequency that makes fewer than `low_freq_factor` turns by `factor`, and
  keeps a frequency that makes more than `high_freq_factor`. Between the two bounds it
  interpolates linearly in the number of turns.

  Attributes:
    factor: divisor of the frequencies.
    low_freq_factor, high_freq_factor: bounds of 'llama3', in turns.
    original_positions: number of tokens within which 'llama3' counts the turns.
  """

  type_name: Literal['linear', 'llama3']
  factor: Positive
  low_freq_factor: float = 0.0
  high_freq_factor: float = 0.0
  original_positions: Count = 0

  def __post_init__(self) -> None:
    low, high = self.low_freq_factor, self.high_freq_factor
    fits = 0 < low < high and self.original_positions > 0
    if self.type_name == 'llama3' and not fits:
      raise ValueError(
        f'low_freq_factor must be less than high_freq_factor, got {self}'
      )


class ModelConfig(schema.Object, kw_only=True):
  """Sizes and switches of one dense or sliced decoder-only transformer.

  A switch stands for one thing that a family does otherwise, so that another family is
  another combination of them.

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
    rotary_dim: how many leading coordinates of a head RoPE rotates; 0 for no RoPE.
    rope_theta: base of RoPE's wavelengths.
    rope_scaling: how RoPE's frequencies are lowered; None if they are not.
    sliding_window: how many tokens a token attends to, itself included; None for all.
    qk_norm_eps: number that the RMSNorm of every query and key adds to the mean square;
      None if queries and keys have no norm.
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
  parallel_block: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  head_bias: bool = False
  norm: Norm
  norm_eps: float
  max_positions: Count
  learned_positions: Count = 0
  rotary_dim: Count = 0
  rope_theta: Positive = 10000.0
  rope_scaling: RopeScaling | None = None
  sliding_window: Count | None = None
  qk_norm_eps: float | None = None
  tied_head: bool = False
  segment_widths: tuple[Count, ...]

  def __post_init__(self) -> None:
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
    least, most = min(self.segment_widths), max(self.segment_widths)
    if not 0 < least <= most <= self.hidden_size:
      raise ValueError(
        f'segment_widths must be from 1 to hidden_size {self.hidden_size}, '
        f'got {least} to {most}'
      )
    if not self.sliced and least < self.hidden_size:
      raise ValueError(f'segments of other widths need norm="rmsn", got {self.norm=}')

  def check_tokens(self, tokens: np.ndarray) -> None:
    """Raises a ValueError if a token is not in the vocabulary."""
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
    return msgspec.structs.replace(
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
