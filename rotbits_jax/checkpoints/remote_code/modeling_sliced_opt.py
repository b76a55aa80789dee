"""OPT after SliceGPT, on top of transformers' OPT."""

from typing import ClassVar

import torch
from torch import nn
from transformers.models.opt import modeling_opt

from .configuration_sliced import SlicedOPTConfig
from .sliced_modules import RMSN
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import layer_output
from .sliced_modules import resize
from .sliced_modules import shortcut


class SlicedDecoderLayer(modeling_opt.OPTDecoderLayer):
  """A layer whose MLP is in the layer itself."""

  def __init__(self, config: SlicedOPTConfig, layer_idx: int):
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


class SlicedOPTDecoder(BackboneMixin, modeling_opt.OPTDecoder):
  config_class = SlicedOPTConfig
  layer_class = SlicedDecoderLayer
  norm_name = 'final_layer_norm'

  def __init__(self, config: SlicedOPTConfig):
    super().__init__(config)
    self.embed_positions = modeling_opt.OPTLearnedPositionalEmbedding(
      config.max_position_embeddings, config.segment_widths[0]
    )
    self.post_init()


class SlicedOPTModel(modeling_opt.OPTModel):
  config_class = SlicedOPTConfig
  _no_split_modules: ClassVar = ['SlicedDecoderLayer']

  def __init__(self, config: SlicedOPTConfig):
    super().__init__(config)
    self.decoder = SlicedOPTDecoder(config)
    self.post_init()


class SlicedOPTForCausalLM(CausalLMMixin, modeling_opt.OPTForCausalLM):
  config_class = SlicedOPTConfig
  model_class = SlicedOPTModel
  head_bias = True
