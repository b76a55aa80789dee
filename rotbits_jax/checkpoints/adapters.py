"""LoRA adapters in the layout of PEFT, for models of known families.

An adapter adds a product of two thin factors to the weights of linear layers. It was
trained for the coordinates of one model. `passes.carry` takes it to those that a preset
chooses. In memory it is a `structured.LowRank` for each kernel, at the path that
`models.layout.adapter_of` gives. The scale of an adapter stands in its config and does
not change.

Reference: LoRA, arXiv 2106.09685.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.system import schema

ADAPTER_CONFIG = 'adapter_config.json'
_WEIGHTS = 'adapter_model.safetensors'
_OF_FILES = '.bin', '.json', '.pt', '.py', '.safetensors'
_MOST_CONFIG = 1 << 20  # bytes
# The factors are `[r, in]` and `[out, r]`; those of an embedding `[r, V]` and `[D, r]`.
_NAME = re.compile(
  r'base_model\.model\.(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))', re.DOTALL
)
# A tensor of the model itself, which PEFT saves if an adapter changes an embedding.
_COPY = re.compile(r'base_model\.model\.(.+)\.base_layer(\.\w+)', re.DOTALL)
# Attributes that say which layers have factors, or how they were trained.
_IGNORED = frozenset([
  'alpha_pattern', 'auto_mapping', 'base_model_name_or_path', 'exclude_modules',
  'inference_mode', 'layers_pattern', 'layers_to_transform', 'lora_alpha',
  'lora_dropout', 'megatron_core', 'peft_version', 'qalora_group_size', 'r',
  'rank_pattern', 'revision', 'target_modules', 'task_type', 'use_rslora',
])  # fmt: skip


class Adapter(NamedTuple):
  """An adapter of a model.

  Attributes:
    name: name of its folder.
    config: the attributes of its config.
    entries: the tensor of the checkpoint that each pair of factors changes, by the
      name of the module in PEFT.
    factors: the factors by path, one of each kernel.
  """

  name: str
  config: dict[str, Any]
  entries: Mapping[str, tensors_lib.ExpectedTensor]
  factors: Mapping[str, structured.LowRank]

  def files(self, factors: Mapping[str, structured.LowRank]) -> dict[str, bytes]:
    """Returns the files of the adapter with other factors, by name.

    The config names no base, because that would be the model in its old coordinates.
    """
    tensors: dict[str, np.ndarray] = {}
    for module, entry in self.entries.items():
      pairs = [factors[models.layout.adapter_of(path)] for path in entry.paths]
      # Kernels that share a tensor read the same input, and share this factor.
      tensors[_name(module, 'A', entry)] = np.asarray(pairs[0].u).T
      both = np.concatenate([np.asarray(pair.v) for pair in pairs], axis=1)
      tensors[_name(module, 'B', entry)] = both.T
    config = self.config | {'base_model_name_or_path': None, 'revision': None}
    return {
      ADAPTER_CONFIG: (json.dumps(config, indent=2, sort_keys=True) + '\n').encode(),
      _WEIGHTS: safetensors_files.to_bytes(tensors),
    }

  def check_place(self, files: Mapping[str, bytes]) -> None:
    """Checks that the adapter can be put beside the files of a checkpoint.

    Raises:
      CheckpointError: if the folder has the name of a file, or another adapter.
    """
    file = f'{self.name}/{ADAPTER_CONFIG}'
    own = files.get(file)
    if pathlib.Path(self.name).suffix in _OF_FILES or self.name in files:
      text = 'has the name of a file of the checkpoint'
    elif own is not None and attributes.parse_json(own, file) != self.config:
      text = 'has the name of one that the checkpoint has in it'
    else:
      return
    raise errors.CheckpointError(f'{self.name}: the folder of the adapter {text}')


def read_adapter(path: str | os.PathLike[str], source: models.Layers) -> Adapter:
  """Reads the adapter in a folder; `source` is the model that it was trained on.

  Raises:
    CheckpointError: if a file is missing or damaged, or if the adapter does more than
      to add products to weights. The message names the attribute or the tensor.
  """
  folder = pathlib.Path(path).absolute()
  file = folder / ADAPTER_CONFIG
  if not file.is_file() or not (folder / _WEIGHTS).is_file():
    raise errors.CheckpointError(
      f'{path}: an adapter is a folder with {ADAPTER_CONFIG} and {_WEIGHTS}'
    )
  if not schema.is_file_name(folder.name):
    raise errors.CheckpointError(f'{path}: the folder of an adapter needs a name')
  parsed = attributes.parse_json(lazy.content(file, _MOST_CONFIG), str(file))
  _check_config(parsed, str(file))
  found = safetensors_files.open_file(folder / _WEIGHTS)
  records = tensors_lib.entries(source.config).items()
  is_expert = lambda record: models.names.expert_index(record) is not None
  known = {x.name: x for record, own in records if not is_expert(record) for x in own}
  entries: dict[str, tensors_lib.ExpectedTensor] = {}
  for name in [name for name in found if _COPY.fullmatch(name)]:
    _check_copy(known, source, name, found.pop(name), str(folder / _WEIGHTS))
  for name in found:
    match = _NAME.fullmatch(name)
    entry = known.get(f'{match[1]}.weight') if match else None
    if (
      match is None
      or entry is None
      or name != _name(match[1], match[2] or match[3], entry)
      or any(models.layout.adapter_of(own) == own for own in entry.paths)
    ):
      raise errors.CheckpointError(
        f'{folder / _WEIGHTS}: {name} is no factor of a weight of the model'
      )
    entries[match[1]] = entry
  factors: dict[str, structured.LowRank] = {}
  for module, entry in entries.items():
    names = [_name(module, side, entry) for side in 'AB']
    outputs, inputs = entry.shape if entry.transposed else entry.shape[::-1]
    rank = next(iter(found[names[0]].shape), 0) if names[0] in found else 0
    for name, shape in zip(names, ((rank, inputs), (outputs, rank)), strict=True):
      if name not in found or found[name].shape != shape or not rank:
        raise errors.CheckpointError(
          f'{folder / _WEIGHTS}: {name} is missing, or is not of the shape of a factor'
        )
      if not jnp.issubdtype(found[name].dtype, jnp.floating):
        raise errors.CheckpointError(
          f'{folder / _WEIGHTS}: {name} has the dtype {found[name].dtype}'
        )
    dtypes = [found[name].dtype for name in names]
    try:
      dtype = jnp.promote_types(*dtypes)
    except ValueError as error:  # JAX widens no float8 by itself
      raise errors.CheckpointError(
        f'{folder / _WEIGHTS}: {names[0]} has the dtype {dtypes[0]}, and {names[1]} '
        f'{dtypes[1]}'
      ) from error
    first, second = (np.asarray(found[name].read()).astype(dtype) for name in names)
    parts = np.split(second, np.cumsum(entry.lengths)[:-1])
    for own, part in zip(entry.paths, parts, strict=True):
      pair = structured.LowRank(first.T, part.T)
      factors[models.layout.adapter_of(own)] = pair
  return Adapter(folder.name, parsed, entries, factors)


def _check_config(parsed: Any, where: str) -> None:
  """Checks that an adapter is plain LoRA.

  Raises:
    CheckpointError: if it is not. It names the attribute.
  """
  config = attributes.Attributes(parsed, where)
  config.require(peft_type='LORA', bias='none')
  # Others, like 'pissa', change the weights of the base when they are loaded.
  if config.take('init_lora_weights', True) not in (True, False, 'gaussian'):
    config.refuse('init_lora_weights', parsed['init_lora_weights'], 'true or false')
  for name in parsed:
    # An attribute without a value turns nothing on: PEFT has new ones in each version.
    if name not in _IGNORED and parsed[name] in (None, False, '', [], {}):
      config.take(name)
  config.finish(_IGNORED)


def _check_copy(
  known: Mapping[str, tensors_lib.ExpectedTensor],
  source: models.Layers,
  name: str,
  tensor: lazy.LazyTensor,
  where: str,
) -> None:
  """Checks that a weight in an adapter is that of the model.

  Raises:
    CheckpointError: if it is not, because tokens were added, for example.
  """
  match = _COPY.fullmatch(name)
  assert match is not None
  entry = known.get(match[1] + match[2])
  if entry is not None and len(entry.paths) == 1 and tensor.shape == entry.shape:
    leaf = structured.flatten(source.outer()).get(entry.paths[0])
    if leaf is not None:
      array = np.asarray(structured.materialize(leaf), np.float32)
      given = np.asarray(tensor.read(), np.float32)
      if np.array_equal(given, array.T if entry.transposed else array):
        return
  raise errors.CheckpointError(f'{where}: {name} is not the weight of the model')


def _name(module: str, side: str, entry: tensors_lib.ExpectedTensor) -> str:
  """Returns the name that PEFT gives to a factor."""
  kind = f'{side}.weight' if entry.transposed else f'embedding_{side}'
  return f'base_model.model.{module}.lora_{kind}'
