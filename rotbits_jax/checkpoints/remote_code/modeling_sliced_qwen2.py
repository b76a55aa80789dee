"""Qwen2 after SliceGPT, on top of transformers' Qwen2."""

from transformers.models.qwen2 import modeling_qwen2

from .configuration_sliced import SlicedQwen2Config
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import DecoderLayerMixin


class SlicedDecoderLayer(DecoderLayerMixin, modeling_qwen2.Qwen2DecoderLayer):
  pass


class SlicedQwen2Model(BackboneMixin, modeling_qwen2.Qwen2Model):
  config_class = SlicedQwen2Config
  layer_class = SlicedDecoderLayer


class SlicedQwen2ForCausalLM(CausalLMMixin, modeling_qwen2.Qwen2ForCausalLM):
  config_class = SlicedQwen2Config
  model_class = SlicedQwen2Model
