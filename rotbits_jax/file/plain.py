"""Plain arrays on their way to a file: PyTrees, and checkpoints of unknown families.

Every unit holds arrays that are stored bit for bit. There is no config.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
import json
from typing import Any, BinaryIO

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import presets
from rotbits_jax import progress as progress_lib
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.file import writer as writer_lib

Flat = dict[str, Any]


class Job:
  """Units of plain arrays, to be written to one file or several.

  Attributes:
    sizes: of each unit, in order.
  """

  def __init__(
    self,
    units: Mapping[str, Callable[[], Flat]],
    sizes: Mapping[str, writer_lib.Sizes],
    preset: presets.Preset,
    *,
    files: Mapping[str, bytes],
    tensors: checkpoints.TensorFiles | None = None,
  ):
    """Checks the preset.

    Args:
      units: functions that return the leaves of a unit by path.
      sizes: see the class.
      preset: `exact`, without further transforms.
      files: other files to keep, whole.
      tensors: the checkpoint that the units are from, if they are from one.

    Raises:
      ValueError: if the preset is another.
    """
    if preset.name != 'exact' or len(preset.names) > 1:
      raise ValueError(
        f'the preset {preset.name!r} needs a model of a known family; plain arrays '
        "can be encoded with 'exact'"
      )
    self.sizes, self._units, self._preset = dict(sizes), units, preset
    self._files, self._tensors = files, tensors

  @property
  def total(self) -> int:
    """How many units there are."""
    return len(self.sizes)

  def fingerprint(self, shards: Sequence[writer_lib.Shard]) -> str | None:
    """Returns a digest of all that decides the bytes; None if a run cannot resume."""
    if self._tensors is None:
      return None
    parts = [self._tensors.fingerprint(), self._preset.name, shards, jax.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def write(
    self,
    shards: Sequence[writer_lib.Shard],
    open_shard: Callable[[writer_lib.Shard], BinaryIO],
    work: writer_lib.Workspace | None,
    bar: progress_lib.Progress,
  ) -> None:
    """Writes shards whose units follow each other.

    Args:
      shards: in order.
      open_shard: takes a shard and returns its file.
      work: what an earlier run has written, and where to note what this one does.
      bar: is told of each unit.
    """
    last = list(self.sizes)[-1:]
    done = list(work.done) if work is not None else []
    count, kept = 0, True
    for shard in shards:
      is_last = set(last) <= set(shard.units)
      files = self._files if is_last else {}
      weights = self._tensors.weights if self._tensors is not None and is_last else ()
      writer = writer_lib.FileWriter(
        open_shard(shard),
        writer_lib.Summary(self._preset, None, None),
        shard.units,
        files,
        [layout.name for layout in weights],
      )
      for name in shard.units:
        kept = (
          kept
          and count < len(done)
          and (done[count][0], done[count][1].name) == (shard.name, name)
          and writer.keep(done[count][1])
        )
        if not kept and work is not None and count < len(done):
          work.forget(count)
          done = done[:count]
        if not kept:
          self._write_unit(writer, shard, name, work)
        count += 1
        bar.update()
      for layout in weights:
        assert self._tensors is not None
        writer.add_weights(layout, self._tensors.rest(layout))
      writer.finish()

  def _write_unit(
    self,
    writer: writer_lib.FileWriter,
    shard: writer_lib.Shard,
    name: str,
    work: writer_lib.Workspace | None,
  ) -> None:
    params = structured.unflatten(self._units[name]())
    unit = symmetries.Unit(name, params, [])
    entry = writer.add(unit, self.sizes[name], {})
    if work is not None:
      work.note({shard: [entry]}, None)


def tensor_job(
  source: checkpoints.TensorFiles,
  preset: presets.Preset,
  files: Mapping[str, bytes] | None,
) -> Job:
  """Returns the job that stores a checkpoint of an unknown family.

  Raises:
    UnsupportedError: if the preset needs a model.
    ValueError: if a tensor has a name with an empty part.
  """
  if preset.name != 'exact':
    raise checkpoints.UnsupportedError(
      f'{source.reason or source.path}; the preset exact stores such a checkpoint as '
      'plain tensors'
    )
  for name in source.specs:
    if not all(name.split('/')):
      raise ValueError(f'{source.path}: {name!r} cannot be the name of a tensor')
  groups = source.groups()
  units = {
    group: functools.partial(lambda own: {x: source.read(x) for x in own}, names)
    for group, names in groups.items()
  }
  sizes = {
    group: writer_lib.Sizes(
      sum(source.specs[name].size for name in names),
      sum(source.specs[name].nbytes for name in names),
    )
    for group, names in groups.items()
  }
  files = source.files if files is None else files
  return Job(units, sizes, preset, files=files, tensors=source)


def tree_job(tree: Any, preset: presets.Preset, files: Mapping[str, bytes]) -> Job:
  """Returns the job that stores a PyTree: every key of its outermost level is a unit.

  Raises:
    ValueError: if the preset is not `exact`, or a leaf is no array.
  """
  units: dict[str, Flat] = {}
  for path, leaf in flatten_tree(tree).items():
    units.setdefault(path.split('/')[0], {})[path] = leaf
  sizes = {
    name: writer_lib.Sizes(structured.count_numbers(own), structured.count_bytes(own))
    for name, own in units.items()
  }
  getters: dict[str, Callable[[], Flat]] = {
    name: functools.partial(dict, own) for name, own in units.items()
  }
  return Job(getters, sizes, preset, files=files)


def flatten_tree(tree: Any) -> Flat:
  """Returns the leaves of any PyTree by path: keys, indices and fields joined by '/'.

  Raises:
    ValueError: if a leaf is no array, if two leaves have one path, or if the tree is an
      array itself.
  """
  found: Flat = {}
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=structured.is_structured)
  for keys, leaf in leaves:
    parts = [_part(key) for key in keys]
    path = '/'.join(parts)
    is_array = isinstance(leaf, (np.ndarray, np.generic, jax.Array))
    if not (structured.is_structured(leaf) or is_array):
      raise ValueError(f'{path}: not an array, got {type(leaf).__name__}')
    if not structured.is_structured(leaf) and jax.dtypes.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
    ):
      raise ValueError(f'{path}: a key; jax.random.key_data gives its numbers')
    if path in found or not all(parts) or path.split('/') != parts:
      raise ValueError(
        f'{path!r}: keys must be different, not empty and without a slash'
      )
    found[path] = leaf
  return found


def _part(key: Any) -> str:
  """Returns what a path says of one step into a PyTree."""
  for name in ('key', 'idx', 'name'):  # of dicts, of sequences, of classes
    if hasattr(key, name):
      return str(getattr(key, name))
  raise ValueError(f'{key!r}: a key of this class has no name')


def unflatten_like(like: Any, flat: Flat) -> Any:
  """Returns a PyTree with the structure of another and the leaves of `flatten_tree`.

  Raises:
    ValueError: if the paths, shapes or dtypes differ.
  """
  expected = flatten_tree(like)
  if wrong := sorted(expected.keys() ^ flat.keys()):
    raise ValueError(f'{wrong[0]}: only one of the file and `like` has it')
  for path, leaf in expected.items():
    kinds = [structured.stack_key(x) for x in (leaf, flat[path])]
    if kinds[0] != kinds[1]:
      raise ValueError(f'{path}: `like` has {kinds[0][1:3]}, the file {kinds[1][1:3]}')
  treedef = jax.tree.structure(like, is_leaf=structured.is_structured)
  return jax.tree.unflatten(treedef, [flat[path] for path in expected])
