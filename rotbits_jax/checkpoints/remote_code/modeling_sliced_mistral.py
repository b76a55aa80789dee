"""Mistral after SliceGPT, on top of transformers' Mistral."""

from transformers.models.mistral import modeling_mistral

from .configuration_sliced import SlicedMistralConfig
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import DecoderLayerMixin


class SlicedDecoderLayer(DecoderLayerMixin, modeling_mistral.MistralDecoderLayer):
  pass


class SlicedMistralModel(BackboneMixin, modeling_mistral.MistralModel):
  config_class = SlicedMistralConfig
  layer_class = SlicedDecoderLayer


class SlicedMistralForCausalLM(CausalLMMixin, modeling_mistral.MistralForCausalLM):
  config_class = SlicedMistralConfig
  model_class = SlicedMistralModel
