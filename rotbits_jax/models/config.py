"""The config of a transformer: its sizes and its switches.

A layer has two sublayers, attention and MLP. A segment is the part of the residual
stream between two steps that write to it: a step is a sublayer, or a whole layer where
attention and MLP run side by side. Segment 0 is the output of the embedding, and the
last segment is the input of the head. A dense model has D numbers in every segment;
SliceGPT makes segments narrower.

Shape letters used throughout the package:
  D  hidden size of the dense model      d  width of a residual segment (d <= D)
  L  layers                              S  residual segments, minus one
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
    kind: 'linear' or 'llama3'.
    factor: divisor of the frequencies.
    low_freq_factor: lower bound of 'llama3', in turns.
    high_freq_factor: upper bound of 'llama3', in turns; must exceed `low_freq_factor`.
    original_positions: number of tokens within which 'llama3' counts the turns.
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
    norm: kind of norm; 'rmsn' is SliceGPT's fused norm, which has no parameters.
    norm_eps: number that the norm adds to the mean square or to the variance.
    max_positions: length of the longest sequence that the model was trained for.
    learned_positions: rows of the position table, including the 2 unused rows at its
      start; 0 where positions are rotary.
    rotary_dim: how many leading numbers of a head RoPE rotates; 0 for no RoPE.
    rope_theta: base of RoPE's wavelengths.
    rope_scaling: how RoPE's frequencies are lowered; None if they are not.
    sliding_window: how many tokens a token attends to, itself included; None for all.
    tied_head: whether the head is the transposed embedding and is not stored.
    segment_widths: width of each residual segment, `[S + 1]`; S is 2L, or L with
      parallel blocks.
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
        f'segment_widths must have {expected} entries for {self.num_layers} layers, '
        f'got {len(self.segment_widths)}'
      )
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads must be a multiple of num_kv_heads, '
        f'got {self.num_heads} and {self.num_kv_heads}'
      )
    if not self.sliced and set(self.segment_widths) != {self.hidden_size}:
      raise ValueError(
        f'segments of a width other than hidden_size require norm="rmsn", '
        f'got {self.norm=}'
      )

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> 'ModelConfig':
    """Makes a config from its fields: the inverse of `dataclasses.asdict`.

    The fields may have been written to JSON and read back.

    Raises:
      ValueError: if a field is missing, unknown, of a wrong type, or inconsistent with
        the other fields.
    """
    given = _checked(cls, fields)
    widths, scaling = given['segment_widths'], given['rope_scaling']
    if not isinstance(widths, list | tuple) or not all(type(n) is int for n in widths):
      raise ValueError(
        f'segment_widths must be a list of integers, got {widths!r:.100}'
      )
    if not all(0 < n <= given['hidden_size'] for n in widths):
      raise ValueError('segment_widths must be positive and at most hidden_size')
    given['segment_widths'] = tuple(widths)
    if scaling is not None:
      if not isinstance(scaling, Mapping):
        raise ValueError(
          f'rope_scaling must be an object or null, got {scaling!r:.100}'
        )
      given['rope_scaling'] = RopeScaling(**_checked(RopeScaling, scaling))
    return cls(**given)

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


def _checked(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """Checks the given fields against a dataclass and adds the missing defaults.

  Raises:
    ValueError: if a field is unknown, is not of its annotated type, or is missing and
      has no default.
  """
  known = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(given) - set(known))
  if unknown:
    raise ValueError(f'the field {unknown[0][:40]!r} is unknown')
  found, kinds = dict[str, Any](), typing.get_type_hints(cls)
  for name, field in known.items():
    if name not in given:
      if field.default is dataclasses.MISSING:
        raise ValueError(f'the field {name!r} is missing')
      found[name] = field.default
      continue
    found[name] = _typed(name, kinds[name], given[name])
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
    right = True  # `from_json` checks nested fields
  if not right:
    raise ValueError(f'{name} has a wrong type or value, got {value!r:.100}')
  return value
