"""Transformer weights without the bits that their symmetries make redundant.

In a Python session:

    import rotbits_jax
    checkpoint = rotbits_jax.load_checkpoint('opt-small-sliced-0.2')
    data = rotbits_jax.encode(checkpoint.model, files=checkpoint.files)
    model = rotbits_jax.decode(data)
    logits = rotbits_jax.models.logits(model, tokens)

Data flows one way: `checkpoints` (files to PyTrees), `models` (Flax forward passes),
`slicing` (dense to sliced), `symmetries` (transforms that leave fewer numbers),
`coding` (numbers to bits), `codec` (the chain and its inverse), `container` (the file),
`evaluation`.
"""

from rotbits_jax import checkpoints
from rotbits_jax import coding
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import slicing
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.checkpoints import Checkpoint
from rotbits_jax.checkpoints import CheckpointError
from rotbits_jax.checkpoints import load_checkpoint
from rotbits_jax.checkpoints import save_checkpoint
from rotbits_jax.codec import PRESETS
from rotbits_jax.codec import Settings
from rotbits_jax.codec import decode
from rotbits_jax.codec import decode_checkpoint
from rotbits_jax.codec import decode_unit
from rotbits_jax.codec import encode
from rotbits_jax.codec import inspect
from rotbits_jax.codec import load
from rotbits_jax.file.container import ContainerError
from rotbits_jax.file.container import write_file
from rotbits_jax.models import Model
from rotbits_jax.models import ModelConfig

__all__ = [
  'PRESETS',
  'Checkpoint',
  'CheckpointError',
  'ContainerError',
  'Model',
  'ModelConfig',
  'Settings',
  'checkpoints',
  'coding',
  'decode',
  'decode_checkpoint',
  'decode_unit',
  'encode',
  'evaluation',
  'inspect',
  'load',
  'load_checkpoint',
  'models',
  'save_checkpoint',
  'slicing',
  'structured',
  'symmetries',
  'write_file',
]
__version__ = '0.1.0'
