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
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.system import progress as progress_lib

Tree = dict[str, Any]


class Job:
  """Records of plain arrays, to be written to one file or several.

  Attributes:
    sizes: of each unit, in order.
  """

  def __init__(
    self,
    units: Mapping[str, Callable[[], Tree]],
    sizes: Mapping[str, writer_lib.Sizes],
    preset: presets.Preset,
    *,
    files: Mapping[str, bytes],
    tensors: checkpoints.TensorFiles | None = None,
  ):
    """Checks the preset.

    Args:
      units: functions that return the leaves of a unit, as nested dicts.
      sizes: see the class.
      preset: `exact`, without further transforms.
      files: other files to keep, whole.
      tensors: the checkpoint that the units are from, if they are from one.

    Raises:
      ValueError: if the preset is another, a file cannot be kept, or a unit has the
        name of another stream.
    """
    if preset.keeps != 'bits':
      raise ValueError(
        f'the preset {preset.name!r} needs a model of a known family; plain arrays '
        "can be encoded with 'exact'"
      )
    weights = [] if tensors is None else [layout.name for layout in tensors.weights]
    writer_lib.check_files(files, *weights)
    container.check_names(writer_lib.stream_names(units, files, weights))
    self.sizes, self._units, self._preset = dict(sizes), units, preset
    self._files, self._tensors = files, tensors

  @property
  def total(self) -> int:
    """How many units there are."""
    return len(self.sizes)

  def fingerprint(self, shards: Sequence[shards_lib.Shard]) -> str | None:
    """Returns a digest of all that decides the bytes; None if a run cannot resume."""
    if self._tensors is None:
      return None
    parts = [self._tensors.fingerprint(), self._preset.name, shards, jax.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def write(
    self,
    shards: Sequence[shards_lib.Shard],
    open_shard: Callable[[shards_lib.Shard], BinaryIO],
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
    shard: shards_lib.Shard,
    name: str,
    work: writer_lib.Workspace | None,
  ) -> None:
    unit = passes.Record(name, self._units[name](), [])
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
  if preset.keeps != 'bits':
    raise checkpoints.UnsupportedError(
      f'{source.reason or source.path}; the preset exact stores such a checkpoint as '
      'plain tensors'
    )
  for name in source.specs:
    if not all(name.split('/')):
      raise ValueError(f'{source.path}: {name!r} cannot be the name of a tensor')
  rests = [x for layout in source.weights for x in layout.rest(source.sizes())]
  if (rest := sum(end - begin for begin, end in rests)) > manifest_lib.MOST_FILES:
    raise ValueError(f'{source.path}: {rest} bytes of its files are not in tensors')
  groups = source.groups()
  units = {
    group: functools.partial(_read, source, names) for group, names in groups.items()
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


def _read(source: checkpoints.TensorFiles, names: Sequence[str]) -> Tree:
  return structured.unflatten({name: source.read(name) for name in names})


def tree_job(tree: Any, preset: presets.Preset, files: Mapping[str, bytes]) -> Job:
  """Returns the job that stores a PyTree: every key of its outermost level is a unit.

  Raises:
    ValueError: if the preset is not `exact`, or a leaf cannot be stored.
  """
  nested = to_dicts(tree)
  for path, leaf in structured.flatten(nested).items():
    if structured.is_structured(leaf):
      writer_lib.check_leaf(path, leaf)
  sizes = {
    name: writer_lib.Sizes(structured.count_elements(own), structured.count_bytes(own))
    for name, own in nested.items()
  }
  units: dict[str, Callable[[], Tree]] = {
    name: functools.partial(dict, {name: own}) for name, own in nested.items()
  }
  return Job(units, sizes, preset, files=files)


def to_dicts(tree: Any) -> Tree:
  """Returns any PyTree as nested dicts with the same leaves.

  The keys are those of dicts, the indices of sequences and the names of fields. Dicts
  may be empty.

  Raises:
    ValueError: if a leaf is no array, if keys cannot be told apart, or if the tree is
      an array itself.
  """
  nested = _to_dicts(tree, '', _array)
  if not isinstance(nested, dict):
    raise ValueError('an array alone is no PyTree: put it into a dict')
  return nested


def _to_dicts(tree: Any, where: str, leaf: Callable[[Any, str], Any]) -> Any:
  """Returns a part of a PyTree as nested dicts; `leaf` gets every leaf and its path."""
  if structured.is_structured(tree):
    return tree
  if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
    children = list(tree.items())
  else:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    if [keys for keys, _ in found] == [()]:
      return leaf(tree, where.removesuffix('/'))
    children = [(''.join(map(_part, keys)), child) for keys, child in found]
  nested: Tree = {}
  for key, child in children:
    if not key or '/' in key or key in nested:
      raise ValueError(
        f'{where}{key!r}: keys must be different, not empty and without a slash'
      )
    nested[key] = _to_dicts(child, f'{where}{key}/', leaf)
  return nested


def _array(leaf: Any, path: str) -> Any:
  if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
    raise ValueError(f'{path}: not an array, got {type(leaf).__name__}')
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise ValueError(f'{path}: a key; jax.random.key_data gives its numbers')
  return leaf


def _part(key: Any) -> str:
  """Returns the name of one step into a PyTree."""
  for name in ('key', 'idx', 'name'):  # of dicts, of sequences, of classes
    if hasattr(key, name):
      return str(getattr(key, name))
  raise ValueError(f'{key!r}: a key of this class has no name')


def unflatten_like(like: Any, found: Tree) -> Any:
  """Returns a PyTree with the structure of another and the leaves of `to_dicts`.

  Raises:
    ValueError: if the paths, shapes or dtypes differ.
  """
  flat, expected = structured.flatten(found), structured.flatten(to_dicts(like))
  if wrong := sorted(expected.keys() ^ flat.keys()):
    raise ValueError(f'{wrong[0]}: only one of the file and `like` has it')
  for path, leaf in expected.items():
    kinds = [structured.stack_key(x) for x in (leaf, flat[path])]
    if kinds[0] != kinds[1]:
      raise ValueError(f'{path}: `like` has {kinds[0][1:3]}, the file {kinds[1][1:3]}')
  treedef = jax.tree.structure(like, is_leaf=structured.is_structured)
  numbered = jax.tree.unflatten(treedef, range(len(expected)))
  numbers = structured.flatten(_to_dicts(numbered, '', lambda leaf, _: leaf))
  paths = sorted(numbers, key=lambda path: numbers[path])
  return jax.tree.unflatten(treedef, [flat[path] for path in paths])
