"""Models to bytes and back: a preset is a chain of transforms and a coder.

    encode: model -> transforms -> units (what is outside the layers, then each layer)
            -> coding.arrays -> container
    decode: container -> one unit at a time -> model

Every stream has a checksum and every array a digest, so that what is decoded is bit for
bit what was encoded, or an error.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import itertools
import mmap
import os
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rotbits_jax import checkpoints
from rotbits_jax import container
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.coding import arrays as coding
from rotbits_jax.container import ContainerError
from rotbits_jax.evaluation import report

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a user may choose beside the preset.

  Attributes:
    tolerance: see `symmetries.remove_gauge`.
    numbers_per_lane: least count of numbers that the coder opens a lane for; see
      `coding.arrays.encode`.
  """

  tolerance: float = 1.5
  numbers_per_lane: int = 2048

  def __post_init__(self) -> None:
    if not 0 <= self.tolerance < float('inf'):
      raise ValueError(
        f'tolerance must be finite and not negative, got {self.tolerance}'
      )
    if self.numbers_per_lane < 256:
      raise ValueError(
        f'numbers_per_lane must be at least 256, got {self.numbers_per_lane}'
      )


_CHAINS: dict[str, Callable[[Settings], tuple[symmetries.Transform, ...]]] = {
  'free': lambda s: (symmetries.remove_gauge(tolerance=s.tolerance),),
  'exact': lambda s: (),
}

PRESETS = tuple(_CHAINS)


def encode(
  model: models.SlicedModel | Tree,
  *,
  preset: str = 'free',
  transforms: tuple[symmetries.Transform, ...] = (),
  settings: Settings | None = None,
  files: Mapping[str, bytes] | None = None,
  stem: str | None = None,
  progress: bool = False,
) -> bytes:
  """Stores a model, or any PyTree of nested dicts of arrays, in few bytes.

  Args:
    model: a `SlicedModel`, or nested dicts with string keys and array leaves; the
      latter only with the preset 'exact', since its symmetries are not known.
    preset: 'free' removes what the function does not depend on; 'exact' keeps every bit
      of the input.
    transforms: further transforms, applied after the preset's own.
    settings: see `Settings`.
    files: the checkpoint's other files, kept as they are.
    stem: the checkpoint's name, for writing it in its own format.
    progress: whether to show a progress bar if stderr is a terminal.

  Returns:
    The bytes of a file, see `container`.

  Raises:
    ValueError: for an unknown preset or a model that cannot be stored.
  """
  if preset not in PRESETS:
    raise ValueError(f'the presets are {", ".join(PRESETS)}; got {preset!r}')
  settings = settings or Settings()
  chain = (*_CHAINS[preset](settings), *transforms)
  manifest: container.Manifest = {
    'preset': preset,
    'settings': dataclasses.asdict(settings),
    'stem': stem,
  }
  if isinstance(model, models.SlicedModel):
    numbers, size = symmetries.count(model)
    model, savings = symmetries.run_chain(chain, model)
    manifest['config'] = dataclasses.asdict(model.config)
  elif chain:
    raise ValueError(
      f'the preset {preset!r} needs a SlicedModel; a PyTree of other arrays can be '
      f"encoded with 'exact', got {type(model).__name__}"
    )
  else:
    leaves = [leaf for _, leaf in _flatten(model)]
    numbers, size = structured.count_numbers(leaves), structured.count_bytes(leaves)
    savings = []
  manifest |= {
    'numbers': {'input': numbers, 'stored': numbers - sum(s.numbers for s in savings)},
    'input_bytes': size,
    'savings': [s._asdict() for s in savings],
    'files': [],
    'units': [],
  }
  streams: dict[str, np.ndarray] = {}
  units = list(_units(model))
  bar = tqdm.tqdm(units, desc='encode', unit='unit', disable=None if progress else True)
  for name, tree in bar:
    entry, unit_streams = _encode_unit(tree, settings)
    manifest['units'].append({'name': name, **entry})
    streams |= {f'{name}/{key}': value for key, value in unit_streams.items()}
  for name, data in (files or {}).items():
    packed = np.frombuffer(zlib.compress(data, 9), np.uint8)
    manifest['files'].append([name, _digest(data)])
    streams[f'files/{name}'] = packed
  return container.pack(manifest, streams)


def decode(data: Any, *, progress: bool = False) -> models.SlicedModel | Tree:
  """The model, or the PyTree, that `encode` stored.

  Args:
    data: what `encode` returned; bytes or a memory map.
    progress: whether to show a progress bar if stderr is a terminal.

  Returns:
    The model with NumPy arrays; structured leaves stay structured. At most one layer
    more than the model is held meanwhile.

  Raises:
    ContainerError: if the data is not of this format or is damaged.
  """
  return _decode(container.Container(data), progress)


def decode_unit(source: str | os.PathLike[str] | bytes, name: str) -> Tree:
  """One layer, or what else decodes on its own, without reading the rest.

  Args:
    source: a path, or bytes.
    name: 'layers.0', 'layers.1', ..., 'embed', 'final_norm', 'head', 'buffers'; of a
      PyTree its top-level keys.

  Returns:
    The parameters, unstacked, with NumPy arrays.

  Raises:
    ContainerError: as for `decode`, or if there is no such unit.
    OSError: if the path cannot be read.
  """
  with _errors_name(source):
    opened = container.Container(_buffer(source))
    for entry in opened.manifest['units']:
      if entry['name'] == name:
        return _decode_unit(entry, opened)
    raise ContainerError(f'{name}: no such unit')


def decode_checkpoint(
  source: str | os.PathLike[str] | bytes, *, progress: bool = False
) -> checkpoints.Checkpoint:
  """The model with its other files and its name, from a path or from bytes.

  Raises:
    ContainerError: as for `decode`, or if what was encoded is no model.
    OSError: if the path cannot be read.
  """
  with _errors_name(source):
    opened = container.Container(_buffer(source))
    model = _decode(opened, progress)
    if not isinstance(model, models.SlicedModel):
      raise ContainerError('the file holds a PyTree, not a model')
    files = {}
    for name, digest in opened.manifest['files']:
      try:
        files[name] = zlib.decompress(opened.stream(f'files/{name}').tobytes())
      except zlib.error as error:
        raise ContainerError(f'files/{name}: {error}') from error
      if _digest(files[name]) != digest:
        raise ContainerError(f'files/{name}: not what was encoded')
    return checkpoints.Checkpoint(model, files, opened.manifest['stem'])


def load(path: str | os.PathLike[str], *, progress: bool = False) -> Any:
  """The model in a file as JAX arrays, see `decode`; structured leaves stay structured.

  Raises:
    ContainerError: as for `decode`.
    OSError: if the path cannot be read.
  """
  with _errors_name(path):
    model = _decode(container.Container(_buffer(path)), progress)
  return jax.tree.map(jnp.asarray, model)


def inspect(source: str | os.PathLike[str] | bytes) -> report.Report:
  """What a file holds and what each step saved, without decoding it.

  Raises:
    ContainerError: if the source is not of this format or its header is damaged.
    OSError: if the path cannot be read.
  """
  with _errors_name(source):
    return report.from_container(container.Container(_buffer(source)))


def _buffer(source: str | os.PathLike[str] | bytes) -> Any:
  """The bytes, or the file's as a memory map."""
  if isinstance(source, bytes):
    return source
  with pathlib.Path(source).open('rb') as file:
    size = os.fstat(file.fileno()).st_size
    # An empty file cannot be mapped.
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b''


@contextlib.contextmanager
def _errors_name(source: str | os.PathLike[str] | bytes) -> Iterator[None]:
  """Puts the path, if there is one, before what is wrong with the file."""
  try:
    yield
  except ContainerError as error:
    if isinstance(source, bytes):
      raise
    raise ContainerError(f'{os.fspath(source)}: {error}') from error


# ---- units ---------------------------------------------------------------------------


def _units(model: models.SlicedModel | Tree) -> Iterator[tuple[str, Tree]]:
  """What decodes on its own: a name and a tree."""
  if not isinstance(model, models.SlicedModel):
    yield from ((name, {name: tree}) for name, tree in model.items())
    return
  yield from ((name, {name: tree}) for name, tree in model.outer().items())
  for index, layer in enumerate(model.layers()):
    yield f'layers.{index}', layer
  if model.buffers:
    yield 'buffers', dict(model.buffers)


def _encode_unit(
  tree: Tree, settings: Settings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A unit's entry in the manifest, and its streams."""
  leaves, stored = [], []
  for path, leaf in _flatten(tree):
    entry: dict[str, Any] = {'path': path}
    parts: dict[str, Any] = {'': leaf}
    if structured.is_structured(leaf):
      leaf_settings, parts = leaf.stored()
      entry |= {'kind': leaf.kind, 'settings': leaf_settings, 'shape': leaf.shape}
    entry['arrays'] = list(parts)
    stored += [np.asarray(array) for array in parts.values()]
    leaves.append(entry)
  unit, streams = coding.encode(stored, numbers_per_lane=settings.numbers_per_lane)
  specs = iter(
    [spec.dtype, spec.shape, spec.shift, _digest(array)]
    for spec, array in zip(unit.arrays, stored, strict=True)
  )
  for entry in leaves:
    entry['arrays'] = {key: next(specs) for key in entry['arrays']}
  return {'lanes': unit.lanes, 'leaves': leaves}, streams


def _decode_unit(entry: dict[str, Any], opened: container.Container) -> Tree:
  """The inverse of `_encode_unit`."""
  name = entry['name']
  specs = [spec for leaf in entry['leaves'] for spec in leaf['arrays'].values()]
  unit = coding.UnitSpec(
    arrays=tuple(
      coding.ArraySpec(dtype=dtype, shape=tuple(shape), shift=shift)
      for dtype, shape, shift, _ in specs
    ),
    lanes=entry['lanes'],
  )
  keys = [key for key in coding.STREAMS if f'{name}/{key}' in opened]
  streams = {key: opened.stream(f'{name}/{key}') for key in keys}
  try:
    decoded = iter(coding.decode(unit, streams))
  except (KeyError, ValueError) as error:
    raise ContainerError(f'{name}: {error}') from error
  tree: Tree = {}
  for leaf in entry['leaves']:
    path = f'{name}/{leaf["path"]}'
    parts = {key: next(decoded) for key in leaf['arrays']}
    for key, (*_, digest) in leaf['arrays'].items():
      if _digest(parts[key]) != digest:
        raise ContainerError(f'{path}: decoded numbers differ from the encoded')
    value: Any = parts.get('')
    if 'kind' in leaf:
      if leaf['kind'] not in structured.KINDS:
        raise ContainerError(
          f'{path}: leaves of kind {leaf["kind"]!r} are unknown; import their module'
        )
      value = structured.KINDS[leaf['kind']].from_stored(leaf['settings'], parts)
    *parents, last = leaf['path'].split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def _decode(opened: container.Container, progress: bool) -> models.SlicedModel | Tree:
  manifest = opened.manifest
  bar = tqdm.tqdm(
    total=len(manifest['units']),
    desc='decode',
    unit='unit',
    disable=None if progress else True,
  )

  def decoded(entries: list[dict[str, Any]]) -> Iterator[Tree]:
    for entry in entries:
      yield _decode_unit(entry, opened)
      bar.update()

  with bar:
    by_name = {entry['name']: entry for entry in manifest['units']}
    layers = [e for name, e in by_name.items() if name.startswith('layers.')]
    if 'config' not in manifest:
      return {k: v for tree in decoded(manifest['units']) for k, v in tree.items()}
    outer = [e for name, e in by_name.items() if e not in layers and name != 'buffers']
    params = {k: v for tree in decoded(outer) for k, v in tree.items()}
    buffers = [by_name['buffers']] if 'buffers' in by_name else []
    runs = [list(run) for _, run in itertools.groupby(layers, _signature)]
    for i, run in enumerate(runs):
      params[f'blocks_{i}'] = models.stack_layers(decoded(run), len(run))
    config = manifest['config']
    config['segment_widths'] = tuple(config['segment_widths'])
    return models.SlicedModel(
      params=params,
      buffers=next(decoded(buffers), {}),
      config=models.ModelConfig(**config),
    )


def _signature(entry: dict[str, Any]) -> Any:
  """Equal for layers that can share a stack."""
  signature = []
  for leaf in entry['leaves']:
    dtype, shape, *_ = next(iter(leaf['arrays'].values()))
    # Structured leaves of different ranks can be stacked: their own shape decides.
    signature.append((leaf['path'], leaf.get('kind'), dtype, leaf.get('shape', shape)))
  return signature


def _flatten(tree: Tree, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """The leaves of nested dicts with their paths."""
  for key, value in tree.items():
    if not isinstance(key, str) or '/' in key:
      raise ValueError(f'{prefix}{key!r}: keys must be strings without a slash')
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{key}/')
    elif structured.is_structured(value) or isinstance(value, (np.ndarray, jax.Array)):
      yield prefix + key, value
    else:
      raise ValueError(f'{prefix}{key}: not an array, got {type(value).__name__}')


def _digest(data: Any) -> str:
  """64 bits of BLAKE2b, in hexadecimal."""
  if isinstance(data, np.ndarray):
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8) if data.size else b''
  return hashlib.blake2b(data, digest_size=8).hexdigest()
