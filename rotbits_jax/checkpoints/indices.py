"""The index of several weights files, in the format of Hugging Face.

A shard is one of several files that share the tensors of a checkpoint. The index is a
JSON file that names the shard of each tensor.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.system import schema

WEIGHTS = 'model.safetensors'
SUFFIX = '.safetensors.index.json'
INDEX = f'model{SUFFIX}'
TORCH_WEIGHTS = 'pytorch_model.bin'
TORCH_INDEX = f'{TORCH_WEIGHTS}.index.json'

_MOST_BYTES = 1 << 25  # the largest checkpoints have an index of 14 MB


@dataclasses.dataclass(frozen=True)
class WeightIndex:
  """The content of an index.

  Attributes:
    weight_map: the file name of the shard of each tensor.
    metadata: any value.
  """

  weight_map: dict[str, schema.FileName]
  metadata: Any = None

  def shards(self) -> dict[str, list[str]]:
    """Returns the names of the tensors in each shard."""
    found: dict[str, list[str]] = {}
    for name, shard in self.weight_map.items():
      found.setdefault(shard, []).append(name)
    return dict(sorted(found.items()))


def read(path: pathlib.Path) -> bytes:
  """Returns the content of an index.

  Raises:
    CheckpointError: if there is no such file, or it is larger than an index.
  """
  return lazy.content(path, _MOST_BYTES)


def parse(content: bytes, where: str) -> WeightIndex:
  """Parses the content of an index, which errors call `where`.

  Raises:
    CheckpointError: if this is not the content of an index.
  """
  value = attributes.parse_json(content, where, most=_MOST_BYTES)
  try:
    return schema.load(WeightIndex, value, where)
  except schema.SchemaError as e:
    raise errors.CheckpointError(str(e)) from e


def to_json(
  shards: Mapping[str, Mapping[str, lazy.TensorSpec]], metadata: Any = None
) -> bytes:
  """Returns the content of an index.

  Args:
    shards: the tensors of each file, by the name of the file.
    metadata: that of an index of these files, which stays, but for the size.
  """
  total = sum(spec.nbytes for shard in shards.values() for spec in shard.values())
  files = {name: file for file, shard in shards.items() for name in shard}
  kept = metadata if isinstance(metadata, dict) else {}
  index = {'metadata': kept | {'total_size': total}, 'weight_map': files}
  return (json.dumps(index, indent=2, sort_keys=True) + '\n').encode()
