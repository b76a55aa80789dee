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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names below, for type checkers and editors
  from rotbits_jax import checkpoints as checkpoints
  from rotbits_jax import coding as coding
  from rotbits_jax import evaluation as evaluation
  from rotbits_jax import file as file
  from rotbits_jax import models as models
  from rotbits_jax import passes as passes
  from rotbits_jax import presets as presets
  from rotbits_jax import slicing as slicing
  from rotbits_jax import structured as structured
  from rotbits_jax import symmetries as symmetries
  from rotbits_jax.api import decode as decode
  from rotbits_jax.api import decode_checkpoint as decode_checkpoint
  from rotbits_jax.api import encode as encode
  from rotbits_jax.api import encode_to_file as encode_to_file
  from rotbits_jax.api import inspect as inspect
  from rotbits_jax.api import load as load
  from rotbits_jax.api import open as open
  from rotbits_jax.api import plan_shards as plan_shards
  from rotbits_jax.api import read_record as read_record
  from rotbits_jax.api import read_tensor as read_tensor
  from rotbits_jax.api import verify as verify
  from rotbits_jax.checkpoints import Checkpoint as Checkpoint
  from rotbits_jax.checkpoints import CheckpointError as CheckpointError
  from rotbits_jax.checkpoints import load_checkpoint as load_checkpoint
  from rotbits_jax.checkpoints import open_checkpoint as open_checkpoint
  from rotbits_jax.checkpoints import save_checkpoint as save_checkpoint
  from rotbits_jax.deltas import apply as apply
  from rotbits_jax.deltas import delta as delta
  from rotbits_jax.file import ContainerError as ContainerError
  from rotbits_jax.file.directory import decode_to_directory as decode_to_directory
  from rotbits_jax.models import Model as Model
  from rotbits_jax.models import ModelConfig as ModelConfig
  from rotbits_jax.presets import PRESETS as PRESETS
  from rotbits_jax.presets import Preset as Preset
  from rotbits_jax.snapshots import snapshot as snapshot
  from rotbits_jax.symmetries.canonicalize import canonicalize as canonicalize

# Names are imported when they are first used, so `symmetries` and
# `coding.bits_back` load without the rest.
_NAMES = {
  'api': 'decode decode_checkpoint encode encode_to_file inspect load open plan_shards '
  'read_record read_tensor verify',
  'checkpoints': 'Checkpoint CheckpointError load_checkpoint open_checkpoint '
  'save_checkpoint',
  'deltas': 'apply delta',
  'file': 'ContainerError',
  'file.directory': 'decode_to_directory',
  'models': 'Model ModelConfig',
  'presets': 'PRESETS Preset',
  'snapshots': 'snapshot',
  'symmetries.canonicalize': 'canonicalize',
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
