"""Reading and writing checkpoints of Hugging Face and SliceGPT, without PyTorch.

A checkpoint is a directory with weights (named tensors), a `config.json` and tokenizer
files. The checkpoint of a sliced model also has a slicing JSON, in which SliceGPT keeps
the width of every residual segment.
"""

from rotbits_jax.checkpoints.config import parse_config
from rotbits_jax.checkpoints.config import parse_object
from rotbits_jax.checkpoints.config import slicing_json
from rotbits_jax.checkpoints.config import with_dtype
from rotbits_jax.checkpoints.config import with_own_head
from rotbits_jax.checkpoints.errors import CheckpointError
from rotbits_jax.checkpoints.errors import UnsupportedError
from rotbits_jax.checkpoints.families import FAMILIES
from rotbits_jax.checkpoints.families import Family
from rotbits_jax.checkpoints.reader import CheckpointReader
from rotbits_jax.checkpoints.reader import PlainFiles
from rotbits_jax.checkpoints.reader import example
from rotbits_jax.checkpoints.reader import from_tensors
from rotbits_jax.checkpoints.reader import in_memory
from rotbits_jax.checkpoints.reader import load_checkpoint
from rotbits_jax.checkpoints.reader import open_any
from rotbits_jax.checkpoints.reader import open_checkpoint
from rotbits_jax.checkpoints.reader import open_plain
from rotbits_jax.checkpoints.tensors import Checkpoint
from rotbits_jax.checkpoints.tensors import LazyTensor
from rotbits_jax.checkpoints.tensors import TensorSpec
from rotbits_jax.checkpoints.tensors import to_tensors
from rotbits_jax.checkpoints.writer import CheckpointWriter
from rotbits_jax.checkpoints.writer import FolderWriter
from rotbits_jax.checkpoints.writer import Format
from rotbits_jax.checkpoints.writer import fitting_files
from rotbits_jax.checkpoints.writer import save_checkpoint

ADAPTER_CONFIG = 'adapter_config.json'
"""Name of the file that PEFT writes beside a LoRA adapter."""

__all__ = [
  'ADAPTER_CONFIG',
  'FAMILIES',
  'Checkpoint',
  'CheckpointError',
  'CheckpointReader',
  'CheckpointWriter',
  'Family',
  'FolderWriter',
  'Format',
  'LazyTensor',
  'PlainFiles',
  'TensorSpec',
  'UnsupportedError',
  'example',
  'fitting_files',
  'from_tensors',
  'in_memory',
  'load_checkpoint',
  'open_any',
  'open_checkpoint',
  'open_plain',
  'parse_config',
  'parse_object',
  'save_checkpoint',
  'slicing_json',
  'to_tensors',
  'with_dtype',
  'with_own_head',
]
