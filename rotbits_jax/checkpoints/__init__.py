"""Reading and writing checkpoints of Hugging Face and SliceGPT, without PyTorch.

A checkpoint is a directory with weights (named tensors), a `config.json` and tokenizer
files. The checkpoint of a sliced model also has a slicing JSON, in which SliceGPT keeps
the width of every residual segment.
"""

from rotbits_jax.checkpoints.checkpoint import example
from rotbits_jax.checkpoints.checkpoint import fitting_files
from rotbits_jax.checkpoints.checkpoint import is_divided
from rotbits_jax.checkpoints.checkpoint import load_checkpoint
from rotbits_jax.checkpoints.checkpoint import open_any
from rotbits_jax.checkpoints.checkpoint import open_checkpoint
from rotbits_jax.checkpoints.checkpoint import open_plain
from rotbits_jax.checkpoints.checkpoint import save_checkpoint
from rotbits_jax.checkpoints.configs import parse_config
from rotbits_jax.checkpoints.configs import slicing_json
from rotbits_jax.checkpoints.configs import with_dtype
from rotbits_jax.checkpoints.configs import with_own_head
from rotbits_jax.checkpoints.contents import ADAPTER_CONFIG
from rotbits_jax.checkpoints.contents import Checkpoint
from rotbits_jax.checkpoints.errors import CheckpointError
from rotbits_jax.checkpoints.errors import UnsupportedError
from rotbits_jax.checkpoints.factors import FACTORS
from rotbits_jax.checkpoints.factors import Factored
from rotbits_jax.checkpoints.factors import FactorNames
from rotbits_jax.checkpoints.families import FAMILIES
from rotbits_jax.checkpoints.families import Family
from rotbits_jax.checkpoints.families import TensorRow
from rotbits_jax.checkpoints.lazy import LazyTensor
from rotbits_jax.checkpoints.lazy import TensorSpec
from rotbits_jax.checkpoints.plain import PlainFiles
from rotbits_jax.checkpoints.plain import PlainWriter
from rotbits_jax.checkpoints.reader import CheckpointReader
from rotbits_jax.checkpoints.reader import from_tensors
from rotbits_jax.checkpoints.tensors import to_tensors
from rotbits_jax.checkpoints.writer import CheckpointWriter
from rotbits_jax.checkpoints.writer import Format

__all__ = [
  'ADAPTER_CONFIG',
  'FACTORS',
  'FAMILIES',
  'Checkpoint',
  'CheckpointError',
  'CheckpointReader',
  'CheckpointWriter',
  'FactorNames',
  'Factored',
  'Family',
  'Format',
  'LazyTensor',
  'PlainFiles',
  'PlainWriter',
  'TensorRow',
  'TensorSpec',
  'UnsupportedError',
  'example',
  'fitting_files',
  'from_tensors',
  'is_divided',
  'load_checkpoint',
  'open_any',
  'open_checkpoint',
  'open_plain',
  'parse_config',
  'save_checkpoint',
  'slicing_json',
  'to_tensors',
  'with_dtype',
  'with_own_head',
]
