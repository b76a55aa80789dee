"""Sliced models as transformers loads them: a folder of weights, config and code.

A folder may bring the code of its model, which `trust_remote_code=True` runs. It is
`remote_code/modeling_sliced.py`, which needs PyTorch, so the package never imports it.
A shortcut is a linear layer, like `attn_shortcut.weight`, `[out, in]`.
"""

from collections.abc import Mapping
import importlib.resources

import numpy as np

from rotbits_jax import models
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints.families import CONFIG

_MODELING = 'modeling_sliced'
_CODE = importlib.resources.files('rotbits_jax.checkpoints') / 'remote_code'
# Endings of modules, and of a file that names a model whose code PEFT makes run.
_HARMFUL = '.py', '.pyc', '.so', '.pyd', 'adapter_config.json'
# Attributes of a config that make code of the Hub run.
_RUNNING = 'custom_pipelines', '_attn_implementation', '_attn_implementation_internal'

# The part of transformers' class names that stands for a family, and its tokenizer.
_CLASSES = {
  'llama': ('Llama', 'LlamaTokenizer'),
  'mistral': ('Mistral', 'LlamaTokenizer'),
  'opt': ('OPT', 'GPT2Tokenizer'),
  'phi': ('Phi', 'CodeGenTokenizer'),
  'phi3': ('Phi3', 'LlamaTokenizer'),
  'qwen2': ('Qwen2', 'Qwen2Tokenizer'),
  'qwen3': ('Qwen3', 'Qwen2Tokenizer'),
}


def renamed(entry: tensors_lib.ExpectedTensor) -> tensors_lib.ExpectedTensor:
  """Returns the tensor in place of one of a sliced model's checkpoint."""
  name = entry.name.removesuffix(families.SHORTCUT_SUFFIX)
  if name == entry.name:
    return entry
  shape = entry.shape[::-1]
  return entry._replace(name=f'{name}.weight', shape=shape, transposed=True)


def sidecars(
  config: models.ModelConfig,
  files: Mapping[str, bytes],
  dtype: np.dtype,
  *,
  code: bool,
) -> dict[str, bytes]:
  """Returns the files beside the weights, with another config and the code.

  `files` has the `config.json` of the model before slicing. What may run code is kept
  only if `code`. The model gets the dtype when it is loaded.
  """
  dense = families.older_rope(families.parse_object(files[CONFIG], CONFIG))
  # transformers 5 prefers `dtype` to the name that 4 knows, too.
  for name in ('dtype', *_RUNNING):
    dense.pop(name, None)
  class_name, tokenizer = _CLASSES[config.family]
  sliced = f'Sliced{class_name}'
  changes = {
    'architectures': [f'{sliced}ForCausalLM'],
    'auto_map': {
      'AutoConfig': f'{_MODELING}.{sliced}Config',
      'AutoModel': f'{_MODELING}.{sliced}Model',
      'AutoModelForCausalLM': f'{_MODELING}.{sliced}ForCausalLM',
    },
    'model_type': f'sliced_{config.family}',
    'segment_widths': list(config.segment_widths),
    'tie_word_embeddings': False,
    'torch_dtype': dtype.name,
  }
  # `AutoTokenizer` knows the tokenizer of a dense model by the model's type, and of a
  # type that it does not know by the class that the config names.
  config_json = families.to_json({'tokenizer_class': tokenizer} | dense | changes)
  is_kept = lambda name: code or not name.lower().endswith(_HARMFUL)
  kept = {name: content for name, content in files.items() if is_kept(name)}
  modeling = (_CODE / f'{_MODELING}.py').read_bytes()
  return {**kept, CONFIG: config_json, f'{_MODELING}.py': modeling}
