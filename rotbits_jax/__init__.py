"""Makes transformer checkpoints smaller: losslessly, or for a measured loss.

In a Python session:

    import rotbits_jax
    rotbits_jax.encode_to_file('opt-small-sliced-0.2', 'opt.rotbits')
    model = rotbits_jax.load('opt.rotbits')
    logits = rotbits_jax.models.logits(model, tokens)

Data flows through the modules in one direction:

    checkpoints   reads and writes checkpoints
    models        configs, parameters and forward passes of transformers
    slicing       makes sliced models from dense ones (SliceGPT)
    structured    leaves that stand for arrays and store fewer elements
    symmetries    pure functions that fix the gauges of weights
    passes        transforms that leave fewer elements to store
    coding        turns arrays into bytes
    presets       combinations of transforms and a coder
    quantisers    finds the codes of weights that were quantised before
    relative      stores arrays relative to those of a base
    file          the encoded file
    evaluation    perplexity and KL divergence of models
"""

import importlib
from typing import Any

# Names are imported when they are first used, so `symmetries` and
# `coding.bits_back` load without the rest.
_NAMES = {
  'api': 'decode decode_checkpoint encode encode_to_file inspect load plan_shards '
  'read_record read_tensor verify',
  'checkpoints': 'Checkpoint CheckpointError load_checkpoint open_checkpoint '
  'save_checkpoint',
  'deltas': 'apply delta',
  'file': 'ContainerError',
  'file.directory': 'decode_to_directory',
  'models': 'Model ModelConfig',
  'presets': 'PRESETS Preset',
  'snapshots': 'snapshot',
  'symmetries': 'canonicalize',
}
_MODULES = {name: module for module in _NAMES for name in _NAMES[module].split()}
_ROOMS = 'checkpoints coding evaluation file models passes presets slicing structured'

__all__ = sorted([*_ROOMS.split(), 'symmetries', *_MODULES])
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
  if name in __all__:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*__all__, '__version__']
