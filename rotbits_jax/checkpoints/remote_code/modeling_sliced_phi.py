"""Phi-2 after SliceGPT, on top of transformers' Phi."""

import torch
from transformers.models.phi import modeling_phi

from .configuration_sliced import SlicedPhiConfig
from .sliced_modules import RMSN
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import layer_output
from .sliced_modules import resize
from .sliced_modules import shortcut


class SlicedDecoderLayer(modeling_phi.PhiDecoderLayer):
  """A layer whose attention and MLP are side by side, past one shortcut."""

  def __init__(self, config: SlicedPhiConfig, layer_idx: int):
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


class SlicedPhiModel(BackboneMixin, modeling_phi.PhiModel):
  config_class = SlicedPhiConfig
  layer_class = SlicedDecoderLayer
  norm_name = 'final_layernorm'


class SlicedPhiForCausalLM(CausalLMMixin, modeling_phi.PhiForCausalLM):
  config_class = SlicedPhiConfig
  model_class = SlicedPhiModel
  head_bias = True
