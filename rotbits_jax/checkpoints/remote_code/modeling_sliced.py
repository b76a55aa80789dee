"""Transformers after SliceGPT, on top of the models of the library transformers.

SliceGPT (arXiv 2401.15024) removes directions of the residual stream. Its segments,
between the sublayers, then have widths and coordinates of their own. Three things
change: a norm has no scale and divides by the width before slicing; a shortcut, which
is a matrix, takes the place of the identity past a sublayer; and each linear layer has
the width of the segment that it reads or writes.

A config has the fields of the dense model's config. Two more describe the segments of
the residual stream, which are numbered from the embedding to the head:

  segment_widths  width of each segment. `hidden_size` is the width before slicing.
  shortcut_ranks  for each shortcut, from one segment to the next: null if it is stored
                  as a matrix, or the columns of its factors, see `GramShortcut`.

The classes whose names end in `Mixin` stand before a class of transformers in the bases
of a class.
"""

from typing import Any

import torch
from torch import nn
import transformers
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.opt import modeling_opt
from transformers.models.phi import modeling_phi
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

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


def _factor(rows: int, columns: int) -> nn.Parameter | None:
  """Makes a factor of a shortcut, if it has columns."""
  if not columns:
    return None
  factor = nn.Parameter(torch.empty(rows, columns))
  nn.init.normal_(factor, std=0.02)
  return factor


def shortcut(config: Any, index: int) -> nn.Module:
  """Makes the shortcut from a segment, given by its index, to the next."""
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
    widths = inputs or old.in_features, outputs or old.out_features
    setattr(module, name, nn.Linear(*widths, bias=old.bias is not None))


def layer_output(hidden_states: torch.Tensor, weights: torch.Tensor | None):
  """Returns the output of a layer of OPT or Phi: a tuple before transformers 5.4.

  The layers of the other families return one tensor in all versions.
  """
  return hidden_states if TRANSFORMERS >= (5, 4) else (hidden_states, weights)


# ---- layers --------------------------------------------------------------------------


class LayerMixin:
  """A layer with attention and then a gated MLP, as Llama has it.

  Attributes:
    attention_inputs: names of the linear layers that read the attention's input.
    mlp_inputs: names of those that read the MLP's input.
  """

  attention_inputs: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj')
  mlp_inputs: tuple[str, ...] = ('gate_proj', 'up_proj')

  def __init__(self, config: Any, layer_idx: int):
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


class Phi3LayerMixin(LayerMixin):
  """A layer with joined projections, and with dropout."""

  attention_inputs = ('qkv_proj',)
  mlp_inputs = ('gate_up_proj',)

  def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, **kwargs)
    residual = self.attn_shortcut(hidden_states)
    hidden_states = residual + self.resid_attn_dropout(attended)
    normed = self.post_attention_layernorm(hidden_states)
    residual = self.mlp_shortcut(hidden_states)
    return residual + self.resid_mlp_dropout(self.mlp(normed))


class PhiLayerMixin:
  """A layer whose attention and MLP are side by side, past one shortcut."""

  def __init__(self, config: Any, layer_idx: int):
    super().__init__(config, layer_idx)
    first, last = config.segment_widths[layer_idx : layer_idx + 2]
    resize(self.self_attn, 'q_proj', 'k_proj', 'v_proj', inputs=first)
    resize(self.self_attn, 'dense', outputs=last)
    resize(self.mlp, 'fc1', inputs=first)
    resize(self.mlp, 'fc2', outputs=last)
    self.input_layernorm = RMSN(config.hidden_size)
    self.attn_shortcut = shortcut(config, layer_idx)

  def forward(self, hidden_states: torch.Tensor, **kwargs):
    normed = self.input_layernorm(hidden_states)
    attended, weights = self.self_attn(hidden_states=normed, **kwargs)
    computed = self.resid_dropout(attended) + self.resid_dropout(self.mlp(normed))
    hidden_states = self.attn_shortcut(hidden_states) + computed
    return layer_output(hidden_states, weights)


class OPTLayerMixin:
  """A layer whose MLP is in the layer itself."""

  def __init__(self, config: Any, layer_idx: int):
    super().__init__(config, layer_idx)
    segment = 2 * layer_idx
    first, middle, last = config.segment_widths[segment : segment + 3]
    resize(self.self_attn, 'q_proj', 'k_proj', 'v_proj', inputs=first)
    resize(self.self_attn, 'out_proj', outputs=middle)
    resize(self, 'fc1', inputs=middle)
    resize(self, 'fc2', outputs=last)
    self.self_attn_layer_norm = RMSN(config.hidden_size)
    self.final_layer_norm = RMSN(config.hidden_size)
    self.attn_shortcut = shortcut(config, segment)
    self.mlp_shortcut = shortcut(config, segment + 1)

  def forward(self, hidden_states: torch.Tensor, **kwargs):
    normed = self.self_attn_layer_norm(hidden_states)
    attended, weights = self.self_attn(hidden_states=normed, **kwargs)
    hidden_states = self.attn_shortcut(hidden_states) + self._dropout(attended)
    normed = self.final_layer_norm(hidden_states)
    computed = self.fc2(self.activation_fn(self.fc1(normed)))
    hidden_states = self.mlp_shortcut(hidden_states) + self._dropout(computed)
    return layer_output(hidden_states, weights)

  def _dropout(self, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x, p=self.dropout, training=self.training)


# ---- models --------------------------------------------------------------------------


class BackboneMixin:
  """A model without its head.

  Attributes:
    layer_class: class of its layers.
    norm_name: name of its final norm.
  """

  layer_class: type[nn.Module]
  norm_name = 'norm'

  def __init__(self, config: Any):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(
      config.vocab_size, config.segment_widths[0], self.padding_idx
    )
    if hasattr(self, 'embed_positions'):  # OPT's
      self.embed_positions = modeling_opt.OPTLearnedPositionalEmbedding(
        config.max_position_embeddings, config.segment_widths[0]
      )
    self.layers = nn.ModuleList(
      self.layer_class(config, index) for index in range(config.num_hidden_layers)
    )
    setattr(self, self.norm_name, RMSN(config.hidden_size))
    self.post_init()


class OPTModelMixin:
  """A model of OPT, whose layers are those of a decoder in it."""

  decoder_class: type[nn.Module]

  def __init__(self, config: Any):
    super().__init__(config)
    self.decoder = self.decoder_class(config)
    self.post_init()


class CausalLMMixin:
  """A model with its head.

  Attributes:
    model_class: class of the model without its head.
    head_bias: whether the head has a bias.
  """

  model_class: type[nn.Module]
  head_bias = False

  def __init__(self, config: Any):
    super().__init__(config)
    self.model = self.model_class(config)
    self.lm_head = nn.Linear(
      config.segment_widths[-1], config.vocab_size, bias=self.head_bias
    )
    self.post_init()


def _add_family(
  family: str,
  module: Any,
  layer_mixin: type = LayerMixin,
  *,
  norm_name: str = 'norm',
  head_bias: bool = False,
) -> None:
  """Adds the classes of a family to this module: config, layer, model and causal LM."""
  name = f'Sliced{family}'
  config_base = getattr(transformers, f'{family}Config')
  fields = {'model_type': f'sliced_{family.lower()}'}
  config_class = type(f'{name}Config', (config_base,), fields)
  layer_bases = layer_mixin, getattr(module, f'{family}DecoderLayer')
  layer_class = type(f'{name}DecoderLayer', layer_bases, {})
  common = {'config_class': config_class, '_no_split_modules': [layer_class.__name__]}
  backbone = common | {'layer_class': layer_class, 'norm_name': norm_name}
  classes = [config_class, layer_class]
  if family == 'OPT':
    decoder = type(f'{name}Decoder', (BackboneMixin, module.OPTDecoder), backbone)
    mixin, fields = OPTModelMixin, common | {'decoder_class': decoder}
    classes.append(decoder)
  else:
    mixin, fields = BackboneMixin, backbone
  model_class = type(f'{name}Model', (mixin, getattr(module, f'{family}Model')), fields)
  fields = common | {'model_class': model_class, 'head_bias': head_bias}
  causal_bases = CausalLMMixin, getattr(module, f'{family}ForCausalLM')
  causal_class = type(f'{name}ForCausalLM', causal_bases, fields)
  for cls in (*classes, model_class, causal_class):
    globals()[cls.__name__] = cls


_add_family('Llama', modeling_llama)
_add_family('Mistral', modeling_mistral)
_add_family('Qwen2', modeling_qwen2)
_add_family('Qwen3', modeling_qwen3)
_add_family('Phi3', modeling_phi3, Phi3LayerMixin)
_add_family(
  'Phi', modeling_phi, PhiLayerMixin, norm_name='final_layernorm', head_bias=True
)
_add_family(
  'OPT', modeling_opt, OPTLayerMixin, norm_name='final_layer_norm', head_bias=True
)
