"""Configs of models that SliceGPT has sliced, for transformers.

A config has the fields of the dense model's config. Two more describe the segments of
the residual stream, which are numbered from the embedding to the head:

  segment_widths  width of each segment. `hidden_size` is the width before slicing.
  shortcut_ranks  for each shortcut, from one segment to the next: null if it is stored
                  as a matrix, or the columns of its factors, see `GramShortcut`.
"""

from transformers import LlamaConfig
from transformers import MistralConfig
from transformers import OPTConfig
from transformers import Phi3Config
from transformers import PhiConfig
from transformers import Qwen2Config
from transformers import Qwen3Config
from transformers import SmolLM3Config


class SlicedLlamaConfig(LlamaConfig):
  model_type = 'sliced_llama'


class SlicedMistralConfig(MistralConfig):
  model_type = 'sliced_mistral'


class SlicedOPTConfig(OPTConfig):
  model_type = 'sliced_opt'


class SlicedPhiConfig(PhiConfig):
  model_type = 'sliced_phi'


class SlicedPhi3Config(Phi3Config):
  model_type = 'sliced_phi3'


class SlicedQwen2Config(Qwen2Config):
  model_type = 'sliced_qwen2'


class SlicedQwen3Config(Qwen3Config):
  model_type = 'sliced_qwen3'


class SlicedSmolLM3Config(SmolLM3Config):
  model_type = 'sliced_smollm3'
