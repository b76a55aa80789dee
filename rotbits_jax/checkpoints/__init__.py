"""Reading and writing checkpoints of Hugging Face and SliceGPT, without PyTorch.

A checkpoint is a directory with weights (named tensors), a `config.json` and tokenizer
files. The checkpoint of a sliced model also has a slicing JSON, in which SliceGPT keeps
the width of every residual segment.

Raises:
  CheckpointError: in all modules, if a file is missing, damaged, unsupported or has
    changed after it was opened, or if a tensor is not one of its config.
"""

from rotbits_jax.checkpoints.errors import CheckpointError as CheckpointError
from rotbits_jax.checkpoints.families import FAMILIES as FAMILIES
from rotbits_jax.checkpoints.families import parse_config as parse_config
from rotbits_jax.checkpoints.families import parse_object as parse_object
from rotbits_jax.checkpoints.families import slicing_json as slicing_json
from rotbits_jax.checkpoints.families import with_dtype as with_dtype
from rotbits_jax.checkpoints.families import with_own_head as with_own_head
from rotbits_jax.checkpoints.folders import Selection as Selection
from rotbits_jax.checkpoints.reader import CheckpointReader as CheckpointReader
from rotbits_jax.checkpoints.reader import Folder as Folder
from rotbits_jax.checkpoints.reader import PlainFiles as PlainFiles
from rotbits_jax.checkpoints.reader import example as example
from rotbits_jax.checkpoints.reader import from_tensors as from_tensors
from rotbits_jax.checkpoints.reader import load_checkpoint as load_checkpoint
from rotbits_jax.checkpoints.reader import model_tensors as model_tensors
from rotbits_jax.checkpoints.reader import open_any as open_any
from rotbits_jax.checkpoints.reader import open_checkpoint as open_checkpoint
from rotbits_jax.checkpoints.reader import open_plain as open_plain
from rotbits_jax.checkpoints.tensors import Checkpoint as Checkpoint
from rotbits_jax.checkpoints.tensors import LazyTensor as LazyTensor
from rotbits_jax.checkpoints.tensors import TensorSpec as TensorSpec
from rotbits_jax.checkpoints.tensors import is_relative_path as is_relative_path
from rotbits_jax.checkpoints.tensors import to_tensors as to_tensors
from rotbits_jax.checkpoints.writer import CheckpointWriter as CheckpointWriter
from rotbits_jax.checkpoints.writer import FolderWriter as FolderWriter
from rotbits_jax.checkpoints.writer import Format as Format
from rotbits_jax.checkpoints.writer import save_checkpoint as save_checkpoint
