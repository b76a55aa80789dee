"""What is fuzzed: each target has seeds, a mutation, and a function of bytes.

Its function ends well, or in an error that the readers promise.
"""

from collections.abc import Callable, Iterable
import json
import math
import pathlib
import random
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from fuzz import mutations
from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.coding import specs
from rotbits_jax.file import manifest
from rotbits_jax.file import report as report_lib
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import files

_SMALL = 1 << 16  # elements of a leaf that is materialized


class Target(NamedTuple):
  """Makes inputs, makes others of them, and reads one, which may end in an error."""

  seeds: Callable[[], Iterable[bytes]]
  mutate: Callable[[bytes, random.Random, mutations.MutateBytes], bytes]
  run: Callable[[bytes], None]
  expected: type[Exception]


def accept_checksums() -> None:
  """Takes every checksum of a decoded array for right: a mutation cannot know them."""
  checksums.of_array, checksums.joined = lambda array: mock.ANY, lambda pieces: mock.ANY


def _read_container(data: bytes) -> None:
  """Reports on a container, and decodes it to memory or to a directory."""
  report = rotbits_jax.inspect(data)
  report.to_text().encode()
  json.dumps(report.to_json(), allow_nan=False)
  report_lib.report_page(data).encode()
  reader = rotbits_jax.file.Reader(data)
  is_model = reader.config is not None and 'config.json' in reader.files()
  if len(data) % 2 and (is_model or reader.is_plain):
    with tempfile.TemporaryDirectory() as folder:
      rotbits_jax.decode_to_directory(data, folder)
    return
  decoded = reader.content()
  params = decoded.params if isinstance(decoded, models.Model) else decoded
  for leaf in structured.flatten(params).values():
    if _is_small(leaf):
      np.asarray(leaf.materialize())


def _is_small(leaf: Any) -> bool:
  """Returns whether a leaf can be materialized here."""
  if not structured.is_structured(leaf) or isinstance(leaf, difference.Difference):
    return False
  return not leaf.needs and math.prod(leaf.shape) <= _SMALL


def _read_leaf(data: bytes) -> None:
  """Makes a leaf from its settings and arrays; ones stand for most elements."""
  try:
    value = json.loads(data)
    settings, arrays = value['settings'], value['arrays']
    named = {}
    for name, (dtype, shape, *elements) in arrays.items():
      if not all(type(n) is int for n in shape) or math.prod(shape) > _SMALL:
        raise ValueError('no array')
      element = np.array([*elements, 1][0], specs.DTYPES[dtype])
      named[name] = np.broadcast_to(element, shape).copy()
    cls, settings = structured.TYPES[value['type']], dict(settings)
  except Exception as error:  # no leaf: the manifest's own checks come before this
    raise ValueError(str(error)) from error
  try:
    leaf = cls.from_stored(settings, named)
    structured.stack_key(leaf)
  except manifest.UNTRUSTED as error:  # as a reader of the manifest does
    raise ValueError(str(error)) from error
  if _is_small(leaf):
    assert np.asarray(leaf.materialize()).shape == leaf.shape
    shapes_of = lambda stored: {name: x.shape for name, x in stored.items()}
    assert shapes_of(leaf.stored()[1]) == shapes_of(named)


def _read_config(data: bytes) -> None:
  """Parses the JSON files of a checkpoint."""
  value: Any = families.parse_object(data, 'config.json')
  config = families.parse_config(value.get('config'), value.get('slicing'))
  models.outer_shapes(config)
  if config.sliced:
    families.slicing_json(config)


def _of_file(
  tensors: Callable[[pathlib.Path], dict[str, Any]], name: str
) -> Callable[[bytes], None]:
  """Returns a function of bytes: of a file, whose small tensors are read."""

  def run(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / name
      path.write_bytes(data)
      for tensor in tensors(path).values():
        if tensor.size <= _SMALL:
          np.array(tensor.read())

  return run


TARGETS: dict[str, Target] = {
  'container': Target(
    lambda: [*seeds.containers_of_models(), *seeds.containers_of_trees().values()],
    mutations.mutate_container,
    _read_container,
    rotbits_jax.ContainerError,
  ),
  'beside_base': Target(
    lambda: seeds.containers_beside_base().values(),
    mutations.mutate_container,
    lambda data: rotbits_jax.decode(data, base=seeds.base()),
    rotbits_jax.ContainerError,
  ),
  'leaves': Target(seeds.stored_leaves, mutations.mutate_json, _read_leaf, ValueError),
  'config': Target(
    seeds.configs, mutations.mutate_json, _read_config, checkpoints.CheckpointError
  ),
  'torch_zip': Target(
    seeds.torch_files,
    mutations.mutate_zip,
    _of_file(lambda path: torch_zip.open_file(files.File.of(path)), 'x.pt'),
    checkpoints.CheckpointError,
  ),
  'plain': Target(
    seeds.safetensors_files,
    mutations.mutate_safetensors,
    _of_file(lambda path: dict(checkpoints.open_plain(path).tensors), 'x.safetensors'),
    checkpoints.CheckpointError,
  ),
}
