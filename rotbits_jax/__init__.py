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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the imports of `__getattr__`
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
  from rotbits_jax.api import decode_to_directory as decode_to_directory
  from rotbits_jax.api import encode as encode
  from rotbits_jax.api import encode_to_file as encode_to_file
  from rotbits_jax.api import inspect as inspect
  from rotbits_jax.api import load as load
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
  from rotbits_jax.models import Model as Model
  from rotbits_jax.models import ModelConfig as ModelConfig
  from rotbits_jax.presets import PRESETS as PRESETS
  from rotbits_jax.presets import Preset as Preset
  from rotbits_jax.snapshots import snapshot as snapshot
  from rotbits_jax.symmetries import canonicalize as canonicalize

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
  'apply': 'deltas',
  'canonicalize': 'symmetries',
  'decode': 'api',
  'decode_checkpoint': 'api',
  'decode_to_directory': 'api',
  'delta': 'deltas',
  'encode': 'api',
  'encode_to_file': 'api',
  'inspect': 'api',
  'load': 'api',
  'load_checkpoint': 'checkpoints',
  'open_checkpoint': 'checkpoints',
  'plan_shards': 'api',
  'read_tensor': 'api',
  'read_record': 'api',
  'save_checkpoint': 'checkpoints',
  'snapshot': 'snapshots',
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
