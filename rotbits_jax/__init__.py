"""Stores transformer weights without the bits that their symmetries make redundant.

In a Python session:

    import rotbits_jax
    rotbits_jax.encode_to_file('opt-small-sliced-0.2', 'opt.rotbits')
    model = rotbits_jax.load('opt.rotbits')
    logits = rotbits_jax.models.logits(model, tokens)

Data flows through the modules in one direction:

    checkpoints   reads and writes checkpoints
    models        configs, parameters and forward passes of transformers
    slicing       makes sliced models from dense ones (SliceGPT)
    structured    leaves that stand for arrays and store fewer numbers
    symmetries    pure functions that fix the gauges of weights
    passes        transforms that leave fewer numbers to store
    coding        codes numbers as bits
    presets       combinations of transforms and a way to code
    file          the encoded file
    evaluation    perplexity and KL divergence of models
"""

import importlib
from typing import Any

# Names are imported when they are first used, because decoding a file does not need the
# modules of evaluation, slicing and encoding.
_MODULES = (
  'checkpoints',
  'coding',
  'evaluation',
  'file',
  'models',
  'passes',
  'presets',
  'report',
  'slicing',
  'structured',
  'symmetries',
)
_NAMES = {
  'Checkpoint': 'checkpoints',
  'CheckpointError': 'checkpoints',
  'ContainerError': 'file',
  'Model': 'models',
  'ModelConfig': 'models',
  'PRESETS': 'presets',
  'Preset': 'presets',
  'apply': 'api',
  'canonicalise': 'symmetries',
  'decode': 'api',
  'decode_checkpoint': 'api',
  'decode_to_directory': 'api',
  'delta': 'api',
  'encode': 'api',
  'encode_to_file': 'api',
  'inspect': 'api',
  'load': 'api',
  'load_checkpoint': 'checkpoints',
  'open_checkpoint': 'checkpoints',
  'read_tensor': 'api',
  'read_record': 'api',
  'save_checkpoint': 'checkpoints',
  'verify': 'api',
}

__all__ = sorted([*_MODULES, *_NAMES])
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  if name in _NAMES:
    return getattr(importlib.import_module(f'{__name__}.{_NAMES[name]}'), name)
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*__all__, '__version__']
