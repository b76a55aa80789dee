"""SmolLM3 after SliceGPT, on top of transformers' SmolLM3."""

from transformers.models.smollm3 import modeling_smollm3

from .configuration_sliced import SlicedSmolLM3Config
from .sliced_modules import BackboneMixin
from .sliced_modules import CausalLMMixin
from .sliced_modules import DecoderLayerMixin


class SlicedDecoderLayer(DecoderLayerMixin, modeling_smollm3.SmolLM3DecoderLayer):
  pass


class SlicedSmolLM3Model(BackboneMixin, modeling_smollm3.SmolLM3Model):
  config_class = SlicedSmolLM3Config
  layer_class = SlicedDecoderLayer


class SlicedSmolLM3ForCausalLM(CausalLMMixin, modeling_smollm3.SmolLM3ForCausalLM):
  config_class = SlicedSmolLM3Config
  model_class = SlicedSmolLM3Model
