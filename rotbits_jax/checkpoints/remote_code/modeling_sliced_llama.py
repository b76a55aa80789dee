"""Llama after SliceGPT, on top of transformers' Llama."""

from transformers.models.llama import modeling_llama

from .configuration_sliced import SlicedLlamaConfig
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import DecoderLayerMixin


class SlicedDecoderLayer(DecoderLayerMixin, modeling_llama.LlamaDecoderLayer):
  pass


class SlicedLlamaModel(BackboneMixin, modeling_llama.LlamaModel):
  config_class = SlicedLlamaConfig
  layer_class = SlicedDecoderLayer


class SlicedLlamaForCausalLM(CausalLMMixin, modeling_llama.LlamaForCausalLM):
  config_class = SlicedLlamaConfig
  model_class = SlicedLlamaModel
