"""Qwen3 after SliceGPT, on top of transformers' Qwen3."""

from transformers.models.qwen3 import modeling_qwen3

from .configuration_sliced import SlicedQwen3Config
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import DecoderLayerMixin


class SlicedDecoderLayer(DecoderLayerMixin, modeling_qwen3.Qwen3DecoderLayer):
  pass


class SlicedQwen3Model(BackboneMixin, modeling_qwen3.Qwen3Model):
  config_class = SlicedQwen3Config
  layer_class = SlicedDecoderLayer


class SlicedQwen3ForCausalLM(CausalLMMixin, modeling_qwen3.Qwen3ForCausalLM):
  config_class = SlicedQwen3Config
  model_class = SlicedQwen3Model
