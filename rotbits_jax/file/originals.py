"""What a file is compared with: a checkpoint, another file, a model or a PyTree."""

from collections.abc import Mapping
import dataclasses
import functools
import io
import os
from typing import Any
from urllib import parse

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import shards
from rotbits_jax.file import sources
from rotbits_jax.system import files as files_lib


@dataclasses.dataclass
class Original:
  """One side of a comparison; the other is a file.

  Attributes:
    name: what errors call it.
    source: its parameters.
    files: its other files by name; None if it has none to compare.
    headers: those of weights files, by name; None if it has none to compare.
    copies: files that memory does not hold, by name; None if it has none to compare.
    missed: names of files in its folder that the other side does not store.
  """

  name: str
  source: passes.Source
  files: Mapping[str, bytes] | None = None
  headers: Mapping[str, bytes] | None = None
  copies: Mapping[str, files_lib.File] | None = None
  missed: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    self._records = records_of(self.source)
    self._read = functools.lru_cache(1)(self._flat)

  def paths(self) -> set[str]:
    """Returns the paths of all parameters."""
    return set(self._records)

  def leaf(self, path: str) -> Any:
    """Reads a parameter."""
    return self._read(self._records[path])[path]

  def model(self) -> models.Model:
    """Returns the model in memory."""
    source: Any = self.source
    if isinstance(source, models.Model):
      return source
    if isinstance(source, reader_lib.Reader):
      return _model(source)
    return source.load().model

  def _flat(self, record: str) -> dict[str, Any]:
    return structured.flatten(self.source.read(record))


def records_of(source: passes.Source) -> dict[str, str]:
  """Returns the record of each parameter by path, without reading any."""
  names = source.records
  if isinstance(source, reader_lib.Reader):
    names = tuple(source.names())  # without the bases of subspaces
  return {
    path: record
    for record in names
    for path in structured.flatten(source.specs(record))
  }


def of(value: Any, reader: reader_lib.Reader) -> Original:
  """Opens what a file is compared with, in the form that suits the file.

  Args:
    value: the path of a checkpoint, or an opened one; the path, bytes or `Reader` of
      another encoded file; a `Model`; a `Checkpoint`; or a PyTree of arrays.
    reader: the file.

  Returns:
    A model if the file has a config, or is the plain tensors of a known family and is
    compared with a model. Else tensors by name, or the leaves of a PyTree.

  Raises:
    ValueError: if the two hold different things, such as a model and a PyTree.
  """
  path = value
  if isinstance(value, checkpoints.CheckpointReader | checkpoints.PlainFiles):
    path = value.given
  if isinstance(path, str | os.PathLike) and not shards.is_encoded(path):
    return _of_checkpoint(path, reader)
  if isinstance(value, str | os.PathLike | bytes | bytearray | memoryview | io.IOBase):
    readable: Any = value
    return _of_file(reader_lib.Reader(readable), reader)
  if isinstance(value, reader_lib.Reader):
    return _of_file(value, reader)
  return _of_memory(value, reader)


def _of_checkpoint(path: str | os.PathLike[str], reader: reader_lib.Reader) -> Original:
  """Opens a checkpoint as plain tensors, or as a model, as the file holds it."""
  name = os.fspath(path)
  # What the file could store of the folder, if it had been told to take all of it.
  selection = checkpoints.Selection(exclude=reader.manifest.exclude, all_files=True)
  source: checkpoints.PlainFiles | checkpoints.CheckpointReader
  if reader.is_plain:
    source = checkpoints.open_plain(path, selection)
  elif reader.config is not None:
    source = checkpoints.open_checkpoint(path, selection)
  else:
    raise ValueError(f'{name}: {_DIFFERENT.format("a PyTree", "a checkpoint")}')
  manifest = reader.manifest
  stored = {*manifest.files, *manifest.copies}
  beside = {*source.files, *source.copies}
  return Original(
    name=name,
    source=source,
    files={x: content for x, content in source.files.items() if x in manifest.files},
    headers=source.headers if reader.is_plain else None,
    copies=source.copies,
    missed=tuple(sorted({*source.missed, *(beside - stored)})),
  )


def _of_file(other: reader_lib.Reader, reader: reader_lib.Reader) -> Original:
  """Returns another encoded file as plain tensors, a model or a PyTree."""
  given = other.inputs[0]
  name = os.fspath(given) if isinstance(given, str | os.PathLike) else 'the other file'
  source: Any = other
  if other.is_plain and reader.config is not None:
    source = other.plain_model()
  elif other.config is not None and other.manifest.keeps != 'bits':
    source = _model(other).materialize()
  if source is None:
    are_alike = False
  elif source.config is not None:
    are_alike = _is_model(reader)
  else:
    are_alike = reader.config is None and other.is_plain == reader.is_plain
  if not are_alike:
    raise ValueError(f'{name}: {_DIFFERENT.format(_kind(reader), _kind(other))}')
  is_plain = other.is_plain and reader.is_plain
  headers = other.headers() if is_plain else None
  return Original(name, source, files=other.files(), headers=headers)


def _of_memory(value: Any, reader: reader_lib.Reader) -> Original:
  """Returns a model, a loaded checkpoint or a PyTree."""
  source: Any = sources.of(value)
  if isinstance(source, models.Model):
    if not _is_model(reader):
      raise ValueError(_DIFFERENT.format(_kind(reader), 'a model'))
    files = None
    if isinstance(value, checkpoints.Checkpoint):
      files = checkpoints.with_own_head(dict(value.files), source.config)
    return Original('the given model', source.rounded(), files=files)
  if reader.config is not None:
    raise ValueError(_DIFFERENT.format('a model', 'a PyTree'))
  if reader.is_plain:  # whose tensors have names, not keys
    flat = structured.flatten(source.tree)
    named = {parse.unquote(path): leaf for path, leaf in flat.items()}
    source = sources.TreeRecords(structured.unflatten(named))
  return Original('the given PyTree', source)


_DIFFERENT = 'the file holds {}, and cannot be compared with {}'


def _is_model(reader: reader_lib.Reader) -> bool:
  """Returns whether a file holds a model, perhaps as plain tensors."""
  if reader.config is None and reader.manifest.keeps == 'bits':
    return reader.plain_model() is not None
  return reader.config is not None


def _kind(reader: reader_lib.Reader) -> str:
  """Returns what a file holds, in words."""
  if reader.config is not None:
    return 'a model'
  return 'plain tensors' if reader.is_plain else 'a PyTree'


def _model(reader: reader_lib.Reader) -> models.Model:
  """Returns the model in a file."""
  content = reader.content(as_model=True)
  assert isinstance(content, models.Model)
  return content
