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


class RopeScaling(schema.Object, kw_only=True):
  """How RoPE's frequencies are lowered to reach beyond the trained positions.

  'linear' divides every frequency by `factor` (arXiv 2306.15595). 'llama3' (Llama
  3.1) counts the turns that a frequency makes within `original_positions` tokens. It
  divides a frequency that makes fewer than `low_freq_factor` turns by `factor`, and
  keeps a frequency that makes more than `high_freq_factor`. Between the two bounds it
  interpolates linearly in the number of turns.
  """

  type_name: Literal['linear', 'llama3']
  factor: Positive
  low_freq_factor: float = 0.0  # in turns
  high_freq_factor: float = 0.0
  original_positions: Count = 0  # of 'llama3'

  def __post_init__(self) -> None:
    low, high = self.low_freq_factor, self.high_freq_factor
    fits = 0 < low < high and self.original_positions > 0
    if self.type_name == 'llama3' and not fits:
      raise ValueError(f'expected low_freq_factor < high_freq_factor, got {self}')


class ModelConfig(schema.Object, kw_only=True):
  """Sizes and switches of one dense or sliced decoder-only transformer.

  A switch stands for one thing that a family does otherwise, so another family is
  another combination of them.
  """

  family: str  # key of `checkpoints.FAMILIES`, whose row names the tensors
  hidden_size: Count  # D; RMSN divides by D in narrower segments, too
  intermediate_size: Count  # F
  num_layers: Count  # L
  num_heads: Count  # H, a multiple of K
  num_kv_heads: Count  # K
  head_dim: Count  # h
  vocab_size: Count  # V
  activation: Activation  # of the MLP
  gated_mlp: bool = False  # whether it is `down(act(gate(x)) * up(x))`
  # Whether attention and MLP read the same input and share one shortcut.
  parallel_block: bool = False
  qkv_bias: bool = False  # whether query, key and value have biases
  out_bias: bool = False  # of the attention's output projection
  mlp_bias: bool = False  # of its projections
  head_bias: bool = False
  norm: Norm  # 'rmsn' is SliceGPT's norm without parameters
  norm_eps: float  # is added to the mean square or to the variance
  max_positions: Count  # length of the longest sequence of the training
  # Rows of the position table, with 2 unused ones at its start; 0 without a table.
  learned_positions: Count = 0
  rotary_dim: Count = 0  # leading coordinates of a head that RoPE rotates
  rope_theta: Positive = 10000.0  # base of RoPE's wavelengths
  rope_scaling: RopeScaling | None = None
  sliding_window: Count | None = None  # tokens that a token attends to; None for all
  # Is added to the mean square of queries and keys by their RMSNorm; None for no norm.
  qk_norm_eps: float | None = None
  tied_head: bool = False  # whether the head is the transposed embedding
  segment_widths: tuple[Count, ...]  # [S + 1]; S is 2L, or L with parallel blocks

  def __post_init__(self) -> None:
    expected = self.segments_per_layer * self.num_layers + 1
    if (count := len(self.segment_widths)) != expected:
      raise ValueError(f'segment_widths must have {expected} entries, got {count}')
    heads, kv_heads = self.num_heads, self.num_kv_heads
    if not 0 < kv_heads <= heads or heads % kv_heads:
      text = f'got {heads} and {kv_heads}'
      raise ValueError(f'num_heads must be a multiple of num_kv_heads, {text}')
    if not self.rotary_dim <= self.head_dim > 0 or self.rotary_dim % 2:
      text = f'got {self.rotary_dim} and {self.head_dim}'
      raise ValueError(f'rotary_dim must be even and at most head_dim, {text}')
    least, most = min(self.segment_widths), max(self.segment_widths)
    if not 0 < least <= most <= self.hidden_size:
      text = f'from 1 to hidden_size {self.hidden_size}, got {least} to {most}'
      raise ValueError(f'segment_widths must be {text}')
    if not self.sliced and least < self.hidden_size:
      raise ValueError(f'segments of other widths need norm="rmsn", got {self.norm=}')

  def checked_tokens(self, tokens: np.ndarray, axes: str) -> np.ndarray:
    """Returns tokens as int32; a ValueError if they have other axes or are unknown."""
    tokens = np.asarray(tokens)
    if tokens.ndim != len(axes.split()) or not np.issubdtype(tokens.dtype, np.integer):
      got = f'{tokens.dtype} {tokens.shape}'
      raise ValueError(f'tokens must be {axes} integers, got {got}')
    outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
    if outside.size:
      text = f"is outside the model's vocabulary of {self.vocab_size}"
      raise ValueError(f'token {outside[0]} {text}')
    return tokens.astype(np.int32)

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
      norm_eps=1e-5,  # SliceGPT's RMSN ignores the epsilon of the dense config
      # The bias of the final LayerNorm becomes a bias of the head.
      head_bias=self.head_bias or self.norm == 'layernorm',
      tied_head=False,
      segment_widths=widths,
    )

  def is_sliced_from(self, dense: 'ModelConfig | None') -> bool:
    """Returns whether a model of this config may be one of a dense config, sliced."""
    if dense is None or dense.sliced or not self.sliced:
      return False
    try:
      return dense.sliced_to(self.segment_widths) == self
    except ValueError:  # another number of segments
      return False

  def layer_widths(self, layer: int) -> tuple[int, ...]:
    """Widths of a layer's segments: `(in, out)` if parallel, or `(in, middle, out)`."""
    step = self.segments_per_layer
    return self.segment_widths[layer * step : layer * step + step + 1]
