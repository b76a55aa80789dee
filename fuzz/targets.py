"""What is fuzzed: each target has seeds, a mutation, and a function of bytes.

A target's function ends well, or in one of the errors that the readers promise. The
checksums of decoded arrays are always right, see `accept_checksums`; those of streams
are made right by the mutation.
"""

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from fuzz import mutations
from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import configs
from rotbits_jax.checkpoints import gguf_files
from rotbits_jax.checkpoints import indices
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding import weights
from rotbits_jax.coding.bits_back import haar
from rotbits_jax.coding.bits_back import permutation
from rotbits_jax.coding.bits_back import rotation_codes
from rotbits_jax.coding.bits_back import symmetric_eig
from rotbits_jax.file import report as report_lib
from rotbits_jax.file import writer
from rotbits_jax.system import checksums
from rotbits_jax.system import schema

Mutate = Callable[[bytes, random.Random, mutations.MutateBytes], bytes]

_SMALL = 1 << 16  # numbers of a leaf that is materialized


class Target(NamedTuple):
  """What is fuzzed.

  Attributes:
    seeds: inputs to begin with.
    mutate: makes another input of one.
    run: reads an input.
    expected: the errors that it may end in.
    encodes: whether it makes files, too, which needs true checksums.
  """

  seeds: Callable[[], Iterable[bytes]]
  mutate: Mutate
  run: Callable[[bytes], None]
  expected: tuple[type[Exception], ...]
  encodes: bool = False


class _Anything:
  """A checksum that equals every other."""

  def __eq__(self, other: object) -> bool:
    return True

  def __ne__(self, other: object) -> bool:
    return False

  __hash__ = None  # type: ignore[assignment]


def accept_checksums() -> None:
  """Takes every checksum of a decoded array for right, in this process.

  A mutation cannot know them, and what is behind them would not be reached.
  """
  checksums.of_array = lambda array, crc=0: _Anything()  # type: ignore[assignment, return-value]


def _container(data: bytes) -> None:
  with rotbits_jax.file.Reader(data) as reader:
    is_model = reader.config is not None and 'config.json' in reader.files()
    if len(data) % 2 and (is_model or reader.weights_files):
      with tempfile.TemporaryDirectory() as folder:
        rotbits_jax.decode_to_directory(data, folder)
      return
    decoded = reader.read()
    reader.files()
    params = decoded.params if isinstance(decoded, models.Model) else decoded
    for leaf in structured.flatten(params).values():
      if _is_small(leaf):
        np.asarray(leaf.materialize())


def _beside_base(data: bytes) -> None:
  with rotbits_jax.file.Reader(data, base=seeds.base()) as reader:
    reader.read()


def _decode(path: pathlib.Path) -> None:
  rotbits_jax.decode(path)


def _is_small(leaf: Any) -> bool:
  """Returns whether a leaf can be materialized here."""
  if (
    not structured.is_structured(leaf)
    or leaf.needs
    or leaf.origin is structured.Origin.KNOWN
  ):
    return False
  return math.prod(leaf.shape) <= _SMALL


def _manifest(data: bytes) -> None:
  with rotbits_jax.file.Reader(data) as reader:
    reader.dtypes(), reader.factors()
  report = rotbits_jax.inspect(data)
  report.to_text().encode()
  json.dumps(report.to_json(), allow_nan=False)
  report_lib.report_page(data).encode()


def _leaf(data: bytes) -> None:
  try:
    value = json.loads(data)
    type_name, settings, arrays = value['type'], value['settings'], value['arrays']
    shapes = [shape for _, shape, *_ in arrays.values()]
    if not all(type(n) is int for shape in shapes for n in shape):
      raise ValueError('no shapes')
    if sum(map(math.prod, shapes)) > _SMALL:
      raise ValueError('the file would be large')
    named = {name: _array(*own) for name, own in arrays.items()}
    cls = structured.TYPES[type_name]
  except Exception as error:  # no leaf: the manifest's own checks come before this
    raise ValueError(str(error)) from error
  if not isinstance(settings, dict):
    raise ValueError('no leaf')
  leaf = cls.from_stored(settings, named)
  structured.stack_key(leaf)
  leaf.stored_sizes()
  if (
    leaf.origin is structured.Origin.KNOWN
    and not leaf.needs
    and math.prod(leaf.shape) <= _SMALL
  ):
    with contextlib.suppress(ValueError):  # the elements are those of another base
      leaf.materialize(np.ones(leaf.shape, leaf.dtype))
  if _is_small(leaf):
    assert np.asarray(leaf.materialize()).shape == leaf.shape
    again = leaf.stored()
    assert {n: x.shape for n, x in again[1].items()} == {
      n: x.shape for n, x in named.items()
    }


def _array(dtype: str, shape: list[int], elements: Any = 1) -> np.ndarray:
  return np.broadcast_to(np.array(elements, weights.DTYPES[dtype]), shape).copy()


def _with_file(
  read: Callable[[pathlib.Path], None],
  name: str,
  beside: Callable[[], dict[str, bytes]] = dict,
) -> Callable[[bytes], None]:
  """Returns a function of bytes that writes them to a file, which is then read.

  Args:
    read: reads a file.
    name: of the file.
    beside: makes other files of the folder, by name.
  """
  folder = tempfile.TemporaryDirectory()
  path = pathlib.Path(folder.name) / name

  def run(data: bytes) -> None:
    if not path.exists():
      for other, content in beside().items():
        (path.parent / other).write_bytes(content)
    assert folder.name  # which keeps the folder
    path.write_bytes(data)
    os.utime(path)
    read(path)

  return run


def _torch(path: pathlib.Path) -> None:
  for tensor in torch_zip.open_file(path).values():
    if tensor.size <= _SMALL:
      np.array(tensor.read())


def _safetensors(path: pathlib.Path) -> None:
  for tensor in safetensors_files.open_file(path).values():
    if tensor.size <= _SMALL:
      np.array(tensor.read())


def _plain(path: pathlib.Path) -> None:
  source = checkpoints.open_tensors(path)
  for tensor in source.tensors.values():
    if tensor.size <= _SMALL:
      np.array(tensor.read())
  for file in source.weights:
    b''.join(source.gaps(file))


def _index(path: pathlib.Path) -> None:
  indices.parse(indices.read(path), str(path)).shards()
  _plain(path)


def _gguf(path: pathlib.Path) -> None:
  source = gguf_files.open_gguf(path)
  if source.elements <= _SMALL:
    source.load()


def _config(data: bytes) -> None:
  value = attributes.parse_json(data, 'config.json')
  value = value if isinstance(value, dict) else {}
  config_json: Any = value.get('config')
  slicing: Any = value.get('slicing')
  configs.stop_tokens({'config.json': json.dumps(config_json).encode()})
  config = configs.parse_config(config_json, slicing)
  models.outer_shapes(config)
  schema.load(models.ModelConfig, json.loads(json.dumps(schema.dump(config))))
  if config.sliced:
    configs.slicing_json(config)


def _pops() -> list[tuple[codecs.Codec, int]]:
  """Returns codecs, each with the number of integers in its symbol."""
  haar_table, eig_table = np.zeros((3, 17), np.int64), np.zeros((2, 17), np.int64)
  haar_table[:2, :4] = eig_table[:, :4] = 4096
  haar_table[2, :2] = 8192  # signs
  sizes = jnp.asarray([1, 2, 3, 1000, 1 << 16], jnp.uint32)
  starts = jnp.asarray([0, 0, 0, 3, 3, 3, 3])
  return [
    (codecs.uniform(sizes), 5),
    (permutation.uniform(starts), 7),
    (haar.codec(5, 5), 10),
    (haar.codec(6, 3), 12),
    (permutation.arrangements(jnp.asarray([0, 0, 2, 3, 3, 3, 6])), 7),
    (symmetric_eig.codec(4), 10),
    (symmetric_eig.spectrum_codec(4), 6),
    (haar.correction_codec(5, 5, jnp.asarray(haar_table)), 20),
    (symmetric_eig.correction_codec(4, jnp.asarray(eig_table)), 20),
  ]


def _message(words: np.ndarray, lanes: int) -> np.ndarray:
  """Returns the words of a message whose states and stacks have any words."""
  if words.size < 2 * lanes:
    raise ValueError('no states')
  low, high, stacks = np.split(words, [lanes, 2 * lanes])
  state = low.astype(np.uint32) | np.maximum(high, 1).astype(np.uint32) << 16
  lane = np.arange(stacks.size) * lanes // max(stacks.size, 1)
  return rans.join_words(state, np.bincount(lane, minlength=lanes), stacks)


class _Codecs:
  """Pops symbols from any words, and pushes them back."""

  def __init__(self) -> None:
    self._codecs: list[Any] = []

  def __call__(self, data: bytes) -> None:
    if not self._codecs:
      self._codecs = [
        (jax.jit(codec.pop), jax.jit(codec.push), size) for codec, size in _pops()
      ]
    if not data:
      raise ValueError('no input')
    choice = data[0]
    words = np.frombuffer(data[1 : 1 + (len(data) - 1) // 2 * 2], '<u2')
    is_correction = choice % 8 == 1
    if choice % 16 > 1:  # few of any words are a message
      words = _message(words, 1 if is_correction else 2)
    if is_correction:
      self._correction(choice, words)
    else:
      self._codec(choice, words)

  def _codec(self, choice: int, words: np.ndarray) -> None:
    pop, push, _ = self._codecs[choice // 4 % len(self._codecs)]
    message = rans.from_words(words, 2, 256)
    rest, symbol = pop(message)
    rans.check(rest)
    again = rans.to_words(rans.check(push(rest, symbol)))
    assert np.array_equal(again, words)

  def _correction(self, choice: int, words: np.ndarray) -> None:
    code, count = (
      (rotation_codes.haar_code(5, 5), 3)
      if choice > 127
      else (rotation_codes.symmetric_eig_code(4, True, None), 2)
    )
    frequencies = np.zeros((count, 17), np.int64)
    frequencies[:, :4] = 4096
    data = tables.to_bytes(frequencies)
    head = np.frombuffer(data + b'\0' * (len(data) % 2), np.uint16)
    code.unpack(np.concatenate([[np.uint16(len(data))], head, words]))


def _resume(data: bytes) -> None:
  """Interrupts a run, changes its input, and compares the next run with a fresh one."""
  if len(data) < 4:
    raise ValueError('no input')
  rng, kept = np.random.default_rng(list(data)), data[0] % 4
  tensors = {f'h.{i}': rng.normal(size=(4, 6)).astype(np.float16) for i in range(4)}
  changed = dict(tensors)
  name = f'h.{data[1] % 4}'
  match data[2] % 6:
    case 0:
      changed[name] = -tensors[name]
    case 1:
      changed[name] = tensors[name].reshape(6, 4)
    case 2:
      changed[name] = tensors[name].view(np.int16)
    case 3:
      changed = dict(reversed(tensors.items()))
    case 4:
      del changed[name]
  real, coded = writer.encode_record, list[str]()

  def encode_record(record: Any, *more: Any) -> Any:
    if len(coded) == kept:
      raise KeyboardInterrupt
    coded.append(record.name)
    return real(record, *more)

  with tempfile.TemporaryDirectory() as folder:
    source, output = pathlib.Path(folder, 'in'), pathlib.Path(folder, 'x')
    source.mkdir()
    seeds.write_tensors(source, tensors)
    with (
      mock.patch.object(writer, 'encode_record', encode_record),
      contextlib.suppress(KeyboardInterrupt),
    ):
      rotbits_jax.encode_to_file(source, output)
    seeds.write_tensors(source, changed)
    rotbits_jax.encode_to_file(source, output)
    rotbits_jax.encode_to_file(source, output.with_name('y'))
    assert output.read_bytes() == output.with_name('y').read_bytes()


@functools.cache
def _models() -> list[models.Model]:
  """Returns small models: a Llama with factors and an OPT, both sliced."""
  return [seeds.low_rank_model(), seeds.sliced_model(seeds.OPT)]


_jitted_logits = jax.jit(models.logits)


def _logits(model: models.Model) -> np.ndarray:
  return np.asarray(_jitted_logits(model.materialize(), np.arange(8)[None]))


def _chain(data: bytes) -> None:
  """Applies a chain of transforms, and compares predictions."""
  if not 1 < len(data) < 8:
    raise ValueError('no input')
  known = list(seeds.transforms().values())
  chain = passes.chain(*(known[x % len(known)] for x in data[1:]))
  model = structured.astype(_models()[data[0] % 2], np.float32)
  is_stored = {x.takes for x in chain.transforms} == {'stored'}
  rounding = None if is_stored else passes.NEAREST
  found = _logits(passes.run_chain((chain,), model, rounding=rounding)[0])
  expected = _logits(model)
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def _special_numbers(given: bytes) -> None:
  """Puts a number that is not finite anywhere, and compares the other predictions."""
  if len(given) != 6:
    raise ValueError('no input')
  model = _models()[given[1] % 2]
  flat = structured.flatten(model.params)
  path = list(flat)[given[2] % len(flat)]
  leaf = flat[path]
  # With `near`, a factor of the number may become 0, or get another sign.
  presets = ('exact', 'free', *(['near'] if path.startswith('embed/') else []))
  preset = presets[given[0] % len(presets)]
  array = leaf.u if structured.is_structured(leaf) else leaf
  changed = np.array(array)
  place = int.from_bytes(given[4:]) * changed.size >> 16
  changed.reshape(-1)[place] = (np.nan, np.inf, -np.inf)[given[3] % 3]
  params = jax.tree.map(lambda x: changed if x is array else x, model.params)
  model = dataclasses.replace(model, params=params)
  expected = _logits(model)
  data = rotbits_jax.encode(model, preset=rotbits_jax.presets.make(preset))
  decoded = rotbits_jax.decode(data)
  assert isinstance(decoded, models.Model)
  found = _logits(decoded)
  finite = np.isfinite(expected)
  assert np.array_equal(np.isfinite(found), finite)
  if finite.any():
    most = {'free': 0.05, 'near': 0.5, 'exact': 0}[preset]
    off = np.abs(found - expected, where=finite, out=np.zeros_like(found))
    assert off.max() <= most * np.std(expected, where=finite)


def _codec_seeds() -> list[bytes]:
  rng = np.random.default_rng(0)
  return [bytes([choice]) + rng.bytes(64) for choice in range(0, 256, 3)]


_CHAINS = ((1, 2, 3, 4, 5), (6, 3), (5, 6, 2), (3, 3, 4), (2, 6, 1, 3))

TARGETS: dict[str, Target] = {
  'container': Target(
    lambda: [
      *seeds.containers_of_models().values(),
      *seeds.containers_of_trees().values(),
    ],
    mutations.mutate_container,
    _container,
    (rotbits_jax.ContainerError,),
  ),
  'beside_base': Target(
    lambda: seeds.containers_beside_base().values(),
    mutations.mutate_container,
    _beside_base,
    (rotbits_jax.ContainerError,),
  ),
  'paper': Target(
    lambda: [seeds.container(x) for x in seeds.presets_of_sweep() if 'paper' in x],
    mutations.mutate_container,
    _container,
    (rotbits_jax.ContainerError,),
  ),
  'manifest': Target(
    lambda: [
      *map(seeds.container, seeds.presets_of_sweep()),
      *seeds.containers_of_trees().values(),
    ],
    mutations.mutate_container,
    _manifest,
    (rotbits_jax.ContainerError,),
  ),
  'leaves': Target(seeds.stored_leaves, mutations.mutate_json, _leaf, (ValueError,)),
  'codecs': Target(
    _codec_seeds, lambda data, rng, mutate: mutate(data), _Codecs(), (ValueError,)
  ),
  'torch_zip': Target(
    seeds.torch_files,
    mutations.mutate_zip,
    _with_file(_torch, 'x.pt'),
    (checkpoints.CheckpointError,),
  ),
  'safetensors': Target(
    seeds.safetensors_files,
    mutations.mutate_safetensors,
    _with_file(_safetensors, 'x.safetensors'),
    (checkpoints.CheckpointError,),
  ),
  'gguf': Target(
    seeds.gguf_files,
    mutations.mutate_gguf,
    _with_file(_gguf, 'x.gguf'),
    (checkpoints.CheckpointError,),
  ),
  'plain_torch': Target(
    lambda: [*seeds.torch_files(), *seeds.nested_torch_files()],
    mutations.mutate_zip,
    _with_file(_plain, 'x.pt'),
    (checkpoints.CheckpointError,),
  ),
  'plain_safetensors': Target(
    seeds.safetensors_files,
    mutations.mutate_safetensors,
    _with_file(_plain, 'x.safetensors'),
    (checkpoints.CheckpointError,),
  ),
  'weights_index': Target(
    lambda: seeds.indices(seeds.shards_of_checkpoint()),
    mutations.mutate_json,
    _with_file(_index, 'model.safetensors.index.json', seeds.shards_of_checkpoint),
    (checkpoints.CheckpointError,),
  ),
  'shards_index': Target(
    lambda: seeds.indices(seeds.shards_of_container()),
    mutations.mutate_json,
    _with_file(_decode, 'x.index.json', seeds.shards_of_container),
    (rotbits_jax.ContainerError,),
  ),
  'resume': Target(
    lambda: [bytes([kept, 1, change, 0]) for kept in range(4) for change in range(6)],
    lambda data, rng, mutate: mutate(data),
    _resume,
    (ValueError,),
    encodes=True,
  ),
  'chains': Target(
    lambda: [bytes([kind, 0, *rest]) for kind in range(2) for rest in _CHAINS],
    lambda data, rng, mutate: mutate(data),
    _chain,
    (ValueError,),
  ),
  'special_numbers': Target(
    lambda: [bytes([i, i // 3, 3 * i, i // 2, 8 * i, i]) for i in range(12)],
    lambda data, rng, mutate: mutate(data),
    _special_numbers,
    (ValueError,),
    encodes=True,
  ),
  'config': Target(
    seeds.configs, mutations.mutate_json, _config, (checkpoints.CheckpointError,)
  ),
}
"""The targets by name."""
