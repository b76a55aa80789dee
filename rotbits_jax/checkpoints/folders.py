"""The files of a folder: weights, files that are kept whole, and files that are not.

Each file of a folder is in one field of its `Listing`, so that nothing is lost without
a word. A folder that cannot be kept is named once, with a slash at its end.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import fnmatch
import os
import pathlib
import re
from typing import NamedTuple

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import tensors as tensors_lib

SAFETENSORS = '.safetensors'
ADAPTER_CONFIG = 'adapter_config.json'
_ADAPTER_WEIGHTS = re.compile(r'adapter_model\.[a-z]+').fullmatch

# Formats of weights and arrays that are not read, beside those that are.
_OTHER_FORMATS = frozenset([
  '.bin', '.ckpt', '.gguf', '.ggml', '.h5', '.keras', '.msgpack', '.npy', '.npz',
  '.onnx', '.onnx_data', '.ot', '.pb', '.pkl', '.pt', '.pth', '.tflite',
])  # fmt: skip
# Settings and counters of a training, in formats that else hold weights.
is_small_state = re.compile(
  r'training_args\.bin|scheduler\.pt|scaler\.pt|rng_state.*\.pth'
).fullmatch
# Files and folders that other programs make anew.
_CACHES = frozenset([
  '__pycache__', '.cache', '.ipynb_checkpoints', '.DS_Store', 'Thumbs.db',
])  # fmt: skip
# Folders in which this package prepares its results, see `system.outputs`.
_is_staging = re.compile(r'\..+\.(?:partial|replaced)').fullmatch
# How files that this package wrote begin, after the length of the header.
_ENCODED = b'{"__metadata__":{"format":"rotbits",'
_MOST_FILES = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """Which files of a folder are stored.

  Attributes:
    exclude: Globs of paths in the folder, as `hf download --exclude` takes them. A `*`
      also stands for slashes; `logs/` is all of a folder. Files that match are left
      out, weights among them.
    all_files: Whether weights in formats that are not read, and files of any size, are
      kept byte for byte.
  """

  exclude: tuple[str, ...] = ()
  all_files: bool = False

  def excludes(self, path: str) -> bool:
    """Returns whether a path in the folder matches one of the globs."""
    return any(
      fnmatch.fnmatchcase(path, f'{glob}*' if glob.endswith('/') else glob)
      for glob in self.exclude
    )


class Listing(NamedTuple):
  """The files of a folder by what becomes of them, as sorted relative paths."""

  safetensors: tuple[str, ...]
  weights: tuple[str, ...]  # in other formats, with their indices
  others: tuple[str, ...]
  lost: tuple[str, ...]  # hidden files, links that leave the folder, unusable names
  ignored: tuple[str, ...]  # caches, and files that this package wrote
  excluded: tuple[str, ...]


def listing(root: pathlib.Path, selection: Selection) -> Listing:
  """Lists a folder and its sub-folders, without reading weights.

  Raises:
    CheckpointError: If there are too many files.
  """
  lists: dict[str, list[str]] = {field: [] for field in Listing._fields}
  for parent, folders, names in os.walk(root):
    base = pathlib.Path(parent)
    entered = []
    for folder in sorted(folders):
      path = (base / folder).relative_to(root).as_posix()
      reason = _closed(base / folder, path, selection)
      if reason is None:
        entered.append(folder)
      else:
        lists[reason].append(f'{path}/')
    folders[:] = entered
    for name in names:
      path = (base / name).relative_to(root).as_posix()
      lists[_fate(base / name, path, root, selection)].append(path)
    if sum(map(len, lists.values())) > _MOST_FILES:
      raise errors.CheckpointError(f'{root}: more than {_MOST_FILES} files')
  return Listing(**{field: tuple(sorted(paths)) for field, paths in lists.items()})


def _closed(folder: pathlib.Path, path: str, selection: Selection) -> str | None:
  """Returns the field of a folder that is not entered; None for all others."""
  if folder.name in _CACHES or _is_staging(folder.name):
    return 'ignored'
  if not folder.is_symlink() and tensors_lib.is_relative_path(path):
    return None
  return 'excluded' if selection.excludes(f'{path}/') else 'lost'


def _fate(
  file: pathlib.Path, path: str, root: pathlib.Path, selection: Selection
) -> str:
  """Returns the field of a file."""
  if file.name in _CACHES or _is_encoded(file):
    return 'ignored'
  if selection.excludes(path):
    return 'excluded'
  if not tensors_lib.is_relative_path(path):
    return 'lost'
  if file.suffix == SAFETENSORS:
    return 'safetensors'
  if not is_inside(file, root):
    return 'lost'
  return 'weights' if _is_of_other_format(file.name) else 'others'


def _is_of_other_format(name: str) -> bool:
  """Returns whether a name is that of weights that are not read, or of their index."""
  if is_small_state(name):
    return False
  file = pathlib.PurePosixPath(name.removesuffix('.index.json'))
  return file.suffix.lower() in _OTHER_FORMATS


def _is_encoded(file: pathlib.Path) -> bool:
  """Returns whether a file was written by this package, or is the index of such."""
  if file.suffix == '.rotbits' or file.name == 'model.rotbits.index.json':
    return True
  if not file.is_file():
    return False
  try:
    with file.open('rb') as opened:
      return opened.read(8 + len(_ENCODED)).startswith(_ENCODED, 8)
  except OSError:  # whoever reads it says why
    return False


def is_inside(file: pathlib.Path, root: pathlib.Path) -> bool:
  """Returns whether a path is that of a regular file in a folder."""
  # An untrusted folder may have links to private files. Those of Hugging Face's cache
  # lead from `snapshots/<revision>`, and from folders in it, into `blobs`.
  folder = pathlib.Path(os.path.realpath(root))
  real = pathlib.Path(os.path.realpath(file))
  revisions = (x for x in (folder, *folder.parents) if x.parent.name == 'snapshots')
  blobs = {x.parent.parent / 'blobs' for x in revisions}
  return real.is_file() and (real.is_relative_to(folder) or real.parent in blobs)


def adapter_configs(
  others: Iterable[str], lost: Iterable[str], stored: Iterable[str]
) -> list[str]:
  """Returns configs of adapters whose weights are not stored: of no use without.

  Args:
    others: The files that could be kept.
    lost: The weights files that are not stored.
    stored: The weights files that are.
  """
  without = _adapter_folders(lost) - _adapter_folders(stored)
  return [
    path
    for path in others
    if path.rpartition('/')[2] == ADAPTER_CONFIG and path.rpartition('/')[0] in without
  ]


def _adapter_folders(weights: Iterable[str]) -> set[str]:
  """Returns the folders with weights of adapters."""
  return {
    path.rpartition('/')[0]
    for path in weights
    if _ADAPTER_WEIGHTS(path.rpartition('/')[2])
  }


def tensor_paths(
  names: Mapping[str, Iterable[str]],
) -> dict[str, dict[str, str]]:
  """Names the tensors of several weights files, each of which gets a path of its own.

  A path is the sub-folder of the file and the tensor's name. If an earlier file has one
  of these paths (`model.safetensors` before `model.fp16.safetensors`), they begin with
  the path of the file itself instead.

  Args:
    names: The names of the tensors in each file, by its path in the folder, in order.

  Returns:
    The path of each tensor by its name, for each file.

  Raises:
    CheckpointError: If two tensors would have one path.
  """
  taken: dict[str, str] = {}
  paths: dict[str, dict[str, str]] = {}
  for file, tensors in names.items():
    folder = file.rpartition('/')[0]
    prefix = f'{folder}/' if folder else ''
    of_file = {name: f'{prefix}{name}' for name in tensors}
    if any(path in taken for path in of_file.values()):
      of_file = {name: f'{file}/{name}' for name in tensors}
    for path in of_file.values():
      if path in taken:
        raise errors.CheckpointError(
          f'{errors.cut(path)}: both {taken[path]} and {file} have this tensor'
        )
      taken[path] = file
    paths[file] = of_file
  return paths
