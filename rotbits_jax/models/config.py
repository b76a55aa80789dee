"""What a transformer is: sizes, switches, and the shape of every parameter.

Shape letters used throughout the package:
  D  hidden size of the dense model      d  width of a residual segment (d <= D)
  L  layers                              S  residual segments less one
  F  MLP width                           V  vocabulary
  H  query heads, K key-value heads      h  width of one head
"""

from collections.abc import Mapping
import dataclasses
import math
import typing
from typing import Any, Literal

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
    """The inverse of `dataclasses.asdict`, also after a way through JSON.

    Raises:
      ValueError: if a field is missing, unknown, or not of its type.
    """
    given = _checked(cls, fields)
    widths, scaling = given['segment_widths'], given['rope_scaling']
    if not isinstance(widths, list | tuple) or not all(type(n) is int for n in widths):
      raise ValueError(f'segment_widths must be a list of widths, got {widths!r:.100}')
    if not all(0 < n <= given['hidden_size'] for n in widths):
      raise ValueError('segment_widths must be positive and at most hidden_size')
    given['segment_widths'] = tuple(widths)
    if scaling is not None:
      if not isinstance(scaling, Mapping):
        raise ValueError(f'rope_scaling must be an object, got {scaling!r:.100}')
      given['rope_scaling'] = RopeScaling(**_checked(RopeScaling, scaling))
    return cls(**given)

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


def _checked(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a dataclass, each of the type that it is annotated with.

  Raises:
    ValueError: if one is missing and has no default, is unknown, or of another type.
  """
  known = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(given) - set(known))
  if unknown:
    raise ValueError(f'the field {unknown[0][:40]!r} is not known')
  found: dict[str, Any] = {}
  for name, field in known.items():
    if name not in given:
      if field.default is dataclasses.MISSING:
        raise ValueError(f'the field {name!r} is missing')
      found[name] = field.default
      continue
    found[name] = _typed(name, typing.get_type_hints(cls)[name], given[name])
  return found


def _typed(name: str, kind: Any, value: Any) -> Any:
  if typing.get_origin(kind) is typing.Literal:
    right = value in typing.get_args(kind)
  elif kind is bool:
    right = type(value) is bool
  elif kind is str:
    right = isinstance(value, str)
  elif kind is float:
    right = type(value) in (int, float) and math.isfinite(value)
    value = float(value) if right else value
  elif kind is int or kind == int | None:
    right = type(value) is int and 0 <= value < 1 << 31
    right |= value is None and kind is not int
  else:
    right = True  # nested fields are checked where they are read
  if not right:
    raise ValueError(f'{name} cannot be {value!r:.100}')
  return value
