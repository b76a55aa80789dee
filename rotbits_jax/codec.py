"""Models to bytes and back: a preset is a chain of transforms and a coder.

    encode: model -> transforms -> units (what is outside the layers, then each layer)
            -> coding.arrays -> container
    decode: container -> one unit at a time -> model

The preset 'paper' codes the whole model on one message instead, see `paper`.

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
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.coding.weights import arrays as coding
from rotbits_jax.file import container
from rotbits_jax.file import report
from rotbits_jax.file.container import ContainerError
from rotbits_jax.presets import paper

Tree = dict[str, Any]


CHOICES = {
  'canonicaliser': ('polar_shortcut', 'qr', 'svd'),
  'rotation_codec': ('haar', 'symmetric_eig'),
  'correction': ('exact', 'threshold'),
}
"""The settings of the preset 'paper' that are names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a user may choose beside the preset.

  Attributes:
    tolerance: see `symmetries.remove_gauge`.
    numbers_per_lane: least count of numbers that the coder opens a lane for; see
      `coding.arrays.encode`.
    canonicaliser: of the preset 'paper': 'polar_shortcut', 'qr' or 'svd' (published).
    rotation_codec: likewise: 'haar' or 'symmetric_eig' (published).
    correction: likewise: 'exact', or 'threshold' (published), which leaves errors of up
      to `threshold` in numbers that rotations were sampled from.
    threshold: see `correction`.
    entropy: whether the preset 'paper' entropy codes its numbers.
  """

  tolerance: float = 0.7
  numbers_per_lane: int = 2048
  canonicaliser: str = 'polar_shortcut'
  rotation_codec: str = 'haar'
  correction: str = 'exact'
  threshold: float = 1e-3
  entropy: bool = False

  def __post_init__(self) -> None:
    if not 0 <= self.tolerance < float('inf'):
      raise ValueError(
        f'tolerance must be finite and not negative, got {self.tolerance}'
      )
    if self.numbers_per_lane < 256:
      raise ValueError(
        f'numbers_per_lane must be at least 256, got {self.numbers_per_lane}'
      )
    for name, known in CHOICES.items():
      if getattr(self, name) not in known:
        raise ValueError(
          f'{name} is one of {", ".join(known)}; got {getattr(self, name)!r}'
        )
    if not 0 < self.threshold < float('inf'):
      raise ValueError(f'threshold must be finite and positive, got {self.threshold}')
    if self.correction == 'threshold' and (
      self.rotation_codec != 'symmetric_eig' or self.entropy
    ):
      raise ValueError(
        "correction='threshold' needs rotation_codec='symmetric_eig' and no entropy "
        'coding: it leaves errors in what the message holds'
      )


_CHAINS: dict[str, Callable[[Settings], tuple[symmetries.Transform, ...]]] = {
  'free': lambda s: (
    # Of numbers as they are stored, small ones can be scaled without loss, too.
    symmetries.scale_neurons(),
    # Rotations first: what follows finds its structure in their coordinates.
    symmetries.remove_gauge(tolerance=s.tolerance),
    symmetries.remove_global_gauge(),
    symmetries.retie_embedding(),
    symmetries.remove_biases(),
    symmetries.remove_value_gauge(),
    symmetries.remove_query_key_gauge(),
    symmetries.remove_low_rank_gauge(),
  ),
  'exact': lambda s: (symmetries.retie_exactly(),),
  'paper': lambda s: (),
}

PRESETS = tuple(_CHAINS)


def chain(
  preset: str, settings: Settings | None = None
) -> tuple[symmetries.Transform, ...]:
  """The transforms of a preset, in order."""
  return _CHAINS[preset](settings or Settings())


def encode(
  model: models.Model | Tree,
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
    model: a `Model` (one that is not rounded yet, whose `stored_as` is set, is
      rounded at the end), or nested dicts with string keys and array leaves; the
      latter only with the preset 'exact', since its symmetries are not known.
    preset: 'free' removes what the function does not depend on; 'exact' keeps every bit
      of the input; 'paper' gets the rotations' bits back as published.
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
  manifest: container.Manifest = {
    'preset': preset,
    'settings': dataclasses.asdict(settings),
    'stem': stem,
  }
  streams: dict[str, np.ndarray] = {}
  if isinstance(model, models.Model):
    numbers, size = symmetries.count(model)
    if preset != 'free':  # which alone has use for numbers that are not rounded yet
      model = symmetries.rounded(model)
    own = chain(preset, settings)
    if preset == 'exact':
      # Bit for bit, so not widened on the way; the embedding in terms of what the head
      # is in the end.
      model, savings = symmetries.run_chain((*transforms, *own), model, widen=False)
    else:
      model, savings = symmetries.run_chain((*own, *transforms), model)
    manifest['config'] = dataclasses.asdict(model.config)
    tied = model.params['embed']['tokens']
    if isinstance(tied, structured.TiedExactly):
      head = model.params['head']['kernel']
      manifest['expanded'] = _digest(tied.expand(head))
    if preset == 'paper':
      savings += [_encode_bits_back(model, settings, manifest, streams, progress)]
      model = dataclasses.replace(model, params={})
  elif preset != 'exact' or transforms:
    raise ValueError(
      f'the preset {preset!r} needs a Model; a PyTree of other arrays can be '
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
    'order_bits': 0.0,
  }
  units = list(_units(model))
  bar = tqdm.tqdm(units, desc='encode', unit='unit', disable=None if progress else True)
  for name, tree in bar:
    neurons = _NEURONS if preset == 'free' and name.startswith('layers.') else {}
    entry, unit_streams, order_bits = _encode_unit(tree, settings, neurons)
    manifest['order_bits'] += order_bits
    manifest['units'].append({'name': name, **entry})
    streams |= {f'{name}/{key}': value for key, value in unit_streams.items()}
  for name, data in (files or {}).items():
    packed = np.frombuffer(zlib.compress(data, 9), np.uint8)
    manifest['files'].append([name, _digest(data)])
    streams[f'files/{name}'] = packed
  return container.pack(manifest, streams)


def decode(data: Any, *, progress: bool = False) -> models.Model | Tree:
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
    entries = {entry['name']: entry for entry in opened.manifest['units']}
    if name not in entries:
      raise ContainerError(f'{name}: no such unit')
    tree = _decode_unit(entries[name], opened)
    if name == 'embed' and 'expanded' in opened.manifest:
      return _expanded(tree | _decode_unit(entries['head'], opened), opened, name)
    return tree


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
    if not isinstance(model, models.Model):
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


# ---- the preset 'paper' --------------------------------------------------------------


def _encode_bits_back(
  model: models.Model,
  settings: Settings,
  manifest: container.Manifest,
  streams: dict[str, np.ndarray],
  progress: bool,
) -> symmetries.Saving:
  """Adds the model's parameters to a manifest and streams; says what that saved."""
  lossy = settings.correction == 'threshold'
  options = paper.Options(
    canonicaliser=settings.canonicaliser,
    rotation_codec=settings.rotation_codec,
    threshold=settings.threshold if lossy else None,
    entropy=settings.entropy,
  )
  encoded = paper.encode(model, options, progress=progress)
  arrays = encoded.arrays
  if lossy:
    # Only decoding tells which errors were left in.
    widths = model.config.segment_widths
    arrays = paper.decode(encoded.layout, encoded.streams, widths)
  digests = {path: _digest(array) for path, array in arrays.items()}
  manifest['bits_back'] = {'layout': encoded.layout, 'digests': digests}
  streams |= {f'bits_back/{k}': v for k, v in encoded.streams.items() if v.size}
  return symmetries.Saving('rotations', 0, int(encoded.net_bits // 8), encoded.notes)


def _decode_bits_back(
  opened: container.Container, config: models.ModelConfig, progress: bool
) -> models.Params:
  """The inverse of `_encode_bits_back`: the parameters."""
  entry = opened.manifest['bits_back']
  streams = {
    name: opened.stream(f'bits_back/{name}')
    for name in paper.STREAMS
    if f'bits_back/{name}' in opened
  }
  try:
    arrays = paper.decode(
      entry['layout'], streams, config.segment_widths, progress=progress
    )
  except (KeyError, ValueError) as error:
    raise ContainerError(f'bits_back: {error}') from error
  tree: Tree = {}
  for path, digest in entry['digests'].items():
    if _digest(arrays[path]) != digest:
      raise ContainerError(f'{path}: decoded numbers differ from the encoded')
    _insert(tree, path, arrays[path])
  layers = [tree.pop(f'layers.{i}') for i in range(config.num_layers)]
  return models.from_layers(config, tree, layers).params


# ---- units ---------------------------------------------------------------------------


def _units(model: models.Model | Tree) -> Iterator[tuple[str, Tree]]:
  """What decodes on its own: a name and a tree."""
  if not isinstance(model, models.Model):
    yield from ((name, {name: tree}) for name, tree in model.items())
    return
  yield from ((name, {name: tree}) for name, tree in model.outer().items())
  for index, layer in enumerate(model.layers()):
    yield f'layers.{index}', layer
  if model.buffers:
    yield 'buffers', dict(model.buffers)


_NEURONS = {
  'mlp/up/kernel': 1,
  'mlp/up/bias': 0,
  'mlp/gate/kernel': 1,
  'mlp/gate/bias': 0,
  'mlp/down/kernel': 0,
}
"""The axes along which a layer's parameters have neurons."""


def _encode_unit(
  tree: Tree, settings: Settings, neurons: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, np.ndarray], float]:
  """A unit's entry in the manifest, its streams, and what the order of neurons saved.

  Args:
    tree: the unit.
    settings: of the coder.
    neurons: the axes of the leaves that have neurons, in any order, by path.
  """
  leaves: list[dict[str, Any]] = []
  stored: list[np.ndarray] = []
  exchangeable: dict[int, int] = {}
  for path, leaf in _flatten(tree):
    if path in neurons:
      if structured.is_structured(leaf):
        neurons, exchangeable = {}, {}  # its neurons have their places
      else:
        exchangeable[len(stored)] = neurons[path]
    entry: dict[str, Any] = {'path': path}
    parts: dict[str, Any] = {'': leaf}
    if structured.is_structured(leaf):
      leaf_settings, parts = leaf.stored()
      entry |= {'kind': leaf.kind, 'settings': leaf_settings, 'shape': leaf.shape}
    entry['arrays'] = list(parts)
    stored += [np.asarray(array) for array in parts.values()]
    leaves.append(entry)
  encoded = coding.encode(
    stored, numbers_per_lane=settings.numbers_per_lane, exchangeable=exchangeable
  )
  specs = iter(
    [*spec.to_json(), _digest(array)]
    for spec, array in zip(encoded.unit.arrays, encoded.arrays, strict=True)
  )
  for entry in leaves:
    entry['arrays'] = {key: next(specs) for key in entry['arrays']}
  entry = {**encoded.unit.to_json(), 'leaves': leaves}
  return entry, encoded.streams, encoded.order_bits


def _decode_unit(entry: dict[str, Any], opened: container.Container) -> Tree:
  """The inverse of `_encode_unit`."""
  name = entry['name']
  specs = [spec for leaf in entry['leaves'] for spec in leaf['arrays'].values()]
  keys = [key for key in coding.STREAMS if f'{name}/{key}' in opened]
  streams = {key: opened.stream(f'{name}/{key}') for key in keys}
  try:
    arrays = [coding.ArraySpec.from_json(spec) for *spec, _ in specs]
    decoded = iter(coding.decode(coding.UnitSpec.from_json(entry, arrays), streams))
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
      kind = structured.KINDS[leaf['kind']]
      try:
        value = kind.from_stored(leaf['settings'], parts)
      except (KeyError, TypeError, ValueError) as error:
        raise ContainerError(f'{path}: {error}') from error
    _insert(tree, leaf['path'], value)
  return tree


def _expanded(params: Tree, opened: container.Container, *names: str) -> Tree:
  """The parameters, or some, with the embedding that was tied to the head exactly."""
  embed, head = params['embed'], params['head']
  try:
    table = embed['tokens'].expand(head['kernel'])
  except ValueError as error:
    raise ContainerError(f'embed/tokens: {error}') from error
  if _digest(table) != opened.manifest['expanded']:
    raise ContainerError('embed/tokens: decoded numbers differ from the encoded')
  params = params | {'embed': embed | {'tokens': table}}
  return {name: params[name] for name in names or params}


def _decode(opened: container.Container, progress: bool) -> models.Model | Tree:
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
    if 'config' not in manifest:
      return {k: v for tree in decoded(manifest['units']) for k, v in tree.items()}
    config = models.ModelConfig.from_json(manifest['config'])
    buffers = by_name.pop('buffers', None)
    layers = [e for name, e in by_name.items() if name.startswith('layers.')]
    outer = [e for e in by_name.values() if e not in layers]
    params = {k: v for tree in decoded(outer) for k, v in tree.items()}
    runs = [list(run) for _, run in itertools.groupby(layers, _signature)]
    for i, run in enumerate(runs):
      params[f'blocks_{i}'] = models.stack_layers(decoded(run), len(run))
    if 'expanded' in manifest:
      params = _expanded(params, opened)
    if 'bits_back' in manifest:
      params = _decode_bits_back(opened, config, progress)
    return models.Model(
      params=params,
      buffers=next(decoded([buffers])) if buffers else {},
      config=config,
    )


def _signature(entry: dict[str, Any]) -> Any:
  """Equal for layers that can share a stack."""
  signature = []
  for leaf in entry['leaves']:
    dtype, shape, *_ = next(iter(leaf['arrays'].values()))
    # Structured leaves of different ranks can be stacked: their own shape decides, and
    # the settings that are names, like the kind of a leaf within a leaf.
    names = [v for v in leaf.get('settings', {}).values() if isinstance(v, str)]
    shape = leaf.get('shape', shape)
    signature.append((leaf['path'], leaf.get('kind'), dtype, shape, names))
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


def _insert(tree: Tree, path: str, value: Any) -> None:
  """The inverse of `_flatten`, a leaf at a time."""
  *parents, last = path.split('/')
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value


def _digest(data: Any) -> str:
  """64 bits of BLAKE2b, in hexadecimal."""
  if isinstance(data, np.ndarray):
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8) if data.size else b''
  return hashlib.blake2b(data, digest_size=8).hexdigest()
