"""Transformers after SliceGPT, on top of the models of the library transformers.

SliceGPT (arXiv 2401.15024) removes directions of the residual stream. Its segments,
between the sublayers, then have widths of their own: a norm has no scale and divides by
the width before slicing, a shortcut takes the place of the identity past a sublayer,
and linear layers have the widths of the segments that they read or write.

A config has the fields of the dense model's config, and `segment_widths`, the width of
each segment from the embedding to the head.
"""

from collections.abc import Callable
import importlib
from typing import Any

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


def resize(module: nn.Module, *names: str, inputs: int = 0, outputs: int = 0) -> None:
  """Replaces linear layers of a module by layers of other widths."""
  for name in names:
    old = getattr(module, name)
    widths = inputs or old.in_features, outputs or old.out_features
    setattr(module, name, nn.Linear(*widths, bias=old.bias is not None))


class LayerMixin:
  """A layer with attention and then an MLP; or with both side by side, after one norm.

  `attention` and `linears` have the names of the linear layers that read the input of
  attention and MLP, and last of the one that writes the output. A layer `has_weights`
  if it returns those of its attention, too, as OPT and Phi do before transformers 5.4.
  """

  norms: tuple[str, ...] = ('input_layernorm', 'post_attention_layernorm')
  attention: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
  linears: tuple[str, ...] = ('gate_proj', 'up_proj', 'down_proj')
  has_weights = False

  def __init__(self, config: Any, layer_idx: int):
    super().__init__(config, layer_idx)
    steps, mlp = len(self.norms), getattr(self, 'mlp', self)  # OPT's is in the layer
    widths = config.segment_widths[steps * layer_idx :]
    resize(self.self_attn, *self.attention[:-1], inputs=widths[0])
    resize(self.self_attn, self.attention[-1], outputs=widths[1])
    resize(mlp, *self.linears[:-1], inputs=widths[steps - 1])
    resize(mlp, self.linears[-1], outputs=widths[steps])
    shortcuts = ('attn_shortcut', 'mlp_shortcut')
    for i, (norm, name) in enumerate(zip(self.norms, shortcuts, strict=False)):
      setattr(self, norm, RMSN(config.hidden_size))
      setattr(self, name, nn.Linear(*widths[i : i + 2], bias=False))
    self.rate = getattr(config, 'resid_pdrop', getattr(config, 'dropout', 0.0))

  def forward(self, hidden_states: torch.Tensor, **kwargs):
    norms = [getattr(self, name) for name in self.norms]
    normed = norms[0](hidden_states)
    attended, weights = self.self_attn(hidden_states=normed, **kwargs)
    hidden_states = self.attn_shortcut(hidden_states) + self.drop(attended)
    if len(norms) == 2:
      normed = norms[1](hidden_states)
      hidden_states = self.mlp_shortcut(hidden_states)
    if hasattr(self, 'mlp'):
      computed = self.mlp(normed)
    else:
      computed = self.fc2(self.activation_fn(self.fc1(normed)))
    hidden_states = hidden_states + self.drop(computed)
    return (hidden_states, weights) if self.has_weights else hidden_states

  def drop(self, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x, p=self.rate, training=self.training)


class Phi3LayerMixin(LayerMixin):
  attention = ('qkv_proj', 'o_proj')
  linears = ('gate_up_proj', 'down_proj')


class PhiLayerMixin(LayerMixin):
  norms = ('input_layernorm',)
  attention = ('q_proj', 'k_proj', 'v_proj', 'dense')
  linears = ('fc1', 'fc2')
  has_weights = TRANSFORMERS < (5, 4)


class OPTLayerMixin(LayerMixin):
  norms = ('self_attn_layer_norm', 'final_layer_norm')
  attention = ('q_proj', 'k_proj', 'v_proj', 'out_proj')
  linears = ('fc1', 'fc2')
  has_weights = TRANSFORMERS < (5, 4)


def _add_family(
  family: str,
  layer_mixin: type = LayerMixin,
  *,
  norm_name: str = 'norm',
  head_bias: bool = False,
) -> None:
  """Adds the classes of a family to this module: config, layer, model and causal LM."""
  name = family.lower()
  module = importlib.import_module(f'transformers.models.{name}.modeling_{name}')

  def add(name: str, *bases: type, **fields: Any) -> type:
    fields['__module__'] = __name__
    cls = type(f'Sliced{family}{name}', bases, fields)
    globals()[cls.__name__] = cls
    return cls

  def add_model(name: str, resize_model: Callable[[Any, Any], None]) -> type:
    base = getattr(module, f'{family}{name}')

    def initialize(self: Any, config: Any) -> None:
      base.__init__(self, config)
      resize_model(self, config)
      self.post_init()

    fields = {'config_class': config, '_no_split_modules': [layer.__name__]}
    return add(name, base, __init__=initialize, **fields)

  def backbone(model: Any, config: Any) -> None:
    vocabulary, width = config.vocab_size, config.segment_widths[0]
    model.embed_tokens = nn.Embedding(vocabulary, width, model.padding_idx)
    if family == 'OPT':
      positions = config.max_position_embeddings
      model.embed_positions = module.OPTLearnedPositionalEmbedding(positions, width)
    layers = (layer(config, index) for index in range(config.num_hidden_layers))
    model.layers = nn.ModuleList(layers)
    setattr(model, norm_name, RMSN(config.hidden_size))

  def with_decoder(model: Any, config: Any) -> None:
    model.decoder = decoder(config)

  def with_head(model: Any, config: Any) -> None:
    width = config.segment_widths[-1]
    model.model = without_head(config)
    model.lm_head = nn.Linear(width, config.vocab_size, bias=head_bias)

  config_base = getattr(transformers, f'{family}Config')
  config = add('Config', config_base, model_type=f'sliced_{name}')
  layer = add('DecoderLayer', layer_mixin, getattr(module, f'{family}DecoderLayer'))
  decoder = add_model('Decoder', backbone) if family == 'OPT' else None
  without_head = add_model('Model', with_decoder if decoder else backbone)
  add_model('ForCausalLM', with_head)


for _family in ('Llama', 'Mistral', 'Qwen2', 'Qwen3'):
  _add_family(_family)
_add_family('Phi3', Phi3LayerMixin)
_add_family('Phi', PhiLayerMixin, norm_name='final_layernorm', head_bias=True)
_add_family('OPT', OPTLayerMixin, norm_name='final_layer_norm', head_bias=True)
