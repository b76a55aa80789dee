"""Phi-3 after SliceGPT, on top of transformers' Phi-3."""

import torch
from transformers.models.phi3 import modeling_phi3

from .configuration_sliced import SlicedPhi3Config
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import DecoderLayerMixin


class SlicedDecoderLayer(DecoderLayerMixin, modeling_phi3.Phi3DecoderLayer):
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


class SlicedPhi3Model(BackboneMixin, modeling_phi3.Phi3Model):
  config_class = SlicedPhi3Config
  layer_class = SlicedDecoderLayer


class SlicedPhi3ForCausalLM(CausalLMMixin, modeling_phi3.Phi3ForCausalLM):
  config_class = SlicedPhi3Config
  model_class = SlicedPhi3Model
