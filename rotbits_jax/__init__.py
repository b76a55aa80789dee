"""Transformer weights without the bits that their symmetries make redundant.

In a Python session:

    import rotbits_jax
    rotbits_jax.encode_to_file('opt-small-sliced-0.2', 'opt.rotbits')
    model = rotbits_jax.load('opt.rotbits')
    logits = rotbits_jax.models.logits(model, tokens)

Data flows one way: `checkpoints` (files to PyTrees), `models` (Flax forward passes),
`slicing` (dense to sliced), `symmetries` (transforms that leave fewer numbers),
`coding` (numbers to bits), `presets` (transforms and a coder), `file` (what is
written and read), `evaluation`.
"""

import importlib
from typing import Any

# Names are imported when they are first used, so that decoding a file does not wait for
# forward passes and evaluation to be imported.
_MODULES = (
  'checkpoints',
  'coding',
  'evaluation',
  'file',
  'models',
  'presets',
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
  'decode': 'codec',
  'decode_checkpoint': 'codec',
  'decode_to_directory': 'codec',
  'encode': 'codec',
  'encode_to_file': 'codec',
  'inspect': 'codec',
  'load': 'codec',
  'load_checkpoint': 'checkpoints',
  'open_checkpoint': 'checkpoints',
  'read_tensor': 'codec',
  'read_unit': 'codec',
  'save_checkpoint': 'checkpoints',
  'verify': 'verification',
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
