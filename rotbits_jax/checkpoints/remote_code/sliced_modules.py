"""The modules that SliceGPT changes in a transformer, in PyTorch.

SliceGPT (arXiv 2401.15024) removes directions of the residual stream. Its segments,
between the sublayers, then have widths and coordinates of their own. Three things
change: a norm has no scale and divides by the width before slicing; a shortcut, which
is a matrix, takes the place of the identity past a sublayer; and each linear layer has
the width of the segment that it reads or writes.

The classes whose names end in `Mixin` stand before a class of transformers in the bases
of a class. The files `modeling_sliced_*.py` combine the two.
"""

from typing import ClassVar

import torch
from torch import nn
import transformers

TRANSFORMERS = tuple(int(x) for x in transformers.__version__.split('.')[:2])
if TRANSFORMERS < (4, 54):
  raise ImportError(
    f'sliced models need transformers 4.54 or newer, got {transformers.__version__}'
  )


class RMSN(nn.Module):
  """The norm `x / sqrt(sum(x^2) / D + 1e-5)` for the width D before slicing.

  SliceGPT uses this epsilon, whatever the config of the dense model says.
  """

  def __init__(self, hidden_size: int):
    super().__init__()
    self.hidden_size = hidden_size

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = x.float()  # the squares of float16 overflow
    square = y.square().sum(-1, keepdim=True)
    return (y * torch.rsqrt(square / self.hidden_size + 1e-5)).to(x.dtype)


class GramShortcut(nn.Module):
  """The shortcut `[I - B B^T + C C^T, 0]`, applied as `x - (x B) B^T + (x C) C^T`.

  Attributes:
    b: B, `[rows, k]`; None if k is 0.
    c: C, `[rows, j]`; None if j is 0.
    columns: width of the output, at least `rows`; zeros are appended.
  """

  def __init__(self, rows: int, columns: int, k: int, j: int):
    super().__init__()
    self.columns = columns
    self.b, self.c = _factor(rows, k), _factor(rows, j)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = x
    if self.b is not None:
      y = y - (x @ self.b) @ self.b.T
    if self.c is not None:
      y = y + (x @ self.c) @ self.c.T
    return nn.functional.pad(y, (0, self.columns - y.shape[-1]))


def shortcut(config, index: int) -> nn.Module:
  """Makes the shortcut from a segment to the next.

  Args:
    config: config of the model.
    index: the segment.
  """
  rows, columns = config.segment_widths[index : index + 2]
  ranks = config.shortcut_ranks[index]
  if ranks is None:
    return nn.Linear(rows, columns, bias=False)
  return GramShortcut(rows, columns, *ranks)


def resize(
  module: nn.Module, *names: str, inputs: int | None = None, outputs: int | None = None
) -> None:
  """Replaces linear layers of a module by layers of other widths."""
  for name in names:
    old = getattr(module, name)
    inputs_, outputs_ = inputs or old.in_features, outputs or old.out_features
    setattr(module, name, nn.Linear(inputs_, outputs_, bias=old.bias is not None))


def layer_output(hidden_states: torch.Tensor, weights: torch.Tensor | None):
  """Returns the output of a layer of OPT or Phi: a tuple before transformers 5.4.

  The layers of the other families return one tensor in all versions.
  """
  return hidden_states if TRANSFORMERS >= (5, 4) else (hidden_states, weights)


class DecoderLayerMixin:
  """A layer with attention and then a gated MLP, as Llama has it.

  Attributes:
    attention_inputs: names of the linear layers that read the attention's input.
    mlp_inputs: names of those that read the MLP's input.
  """

  attention_inputs: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj')
  mlp_inputs: tuple[str, ...] = ('gate_proj', 'up_proj')

  def __init__(self, config, layer_idx: int):
    super().__init__(config, layer_idx)
    segment = 2 * layer_idx
    first, middle, last = config.segment_widths[segment : segment + 3]
    resize(self.self_attn, *self.attention_inputs, inputs=first)
    resize(self.self_attn, 'o_proj', outputs=middle)
    resize(self.mlp, *self.mlp_inputs, inputs=middle)
    resize(self.mlp, 'down_proj', outputs=last)
    self.input_layernorm = RMSN(config.hidden_size)
    self.post_attention_layernorm = RMSN(config.hidden_size)
    self.attn_shortcut = shortcut(config, segment)
    self.mlp_shortcut = shortcut(config, segment + 1)

  def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, **kwargs)
    hidden_states = self.attn_shortcut(hidden_states) + attended
    normed = self.post_attention_layernorm(hidden_states)
    return self.mlp_shortcut(hidden_states) + self.mlp(normed)


class BackboneMixin:
  """A model without its head.

  Attributes:
    layer_class: class of its layers, which must be named `SlicedDecoderLayer`.
    norm_name: name of its final norm.
  """

  layer_class: type[nn.Module]
  norm_name = 'norm'
  _no_split_modules: ClassVar = ['SlicedDecoderLayer']

  def __init__(self, config):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(
      config.vocab_size, config.segment_widths[0], self.padding_idx
    )
    self.layers = nn.ModuleList(
      self.layer_class(config, index) for index in range(config.num_hidden_layers)
    )
    setattr(self, self.norm_name, RMSN(config.hidden_size))
    self.post_init()


class CausalLMMixin:
  """A model with its head.

  Attributes:
    model_class: class of the model without its head.
    head_bias: whether the head has a bias.
  """

  model_class: type[nn.Module]
  head_bias = False
  _no_split_modules: ClassVar = ['SlicedDecoderLayer']

  def __init__(self, config):
    super().__init__(config)
    self.model = self.model_class(config)
    self.lm_head = nn.Linear(
      config.segment_widths[-1], config.vocab_size, bias=self.head_bias
    )
    self.post_init()


def _factor(rows: int, columns: int) -> nn.Parameter | None:
  if not columns:
    return None
  factor = nn.Parameter(torch.empty(rows, columns))
  nn.init.normal_(factor, std=0.02)
  return factor
