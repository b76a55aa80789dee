"""Encodes a source: rewrites its records with a preset, codes them, and writes them.

    source -> transforms of the preset -> writer -> container

Records are rewritten while those before them are coded. A range of records can be
encoded without the others, so that a shard is a job of its own, see `output`.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import functools
import hashlib
import io
import json
import platform
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.file import coders
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file import sources
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import recipe as recipe_lib
from rotbits_jax.system import progress as progress_lib
from rotbits_jax.system import schema

_Batch = tuple[list[passes.Record], Any]
"""Records, and the state of the transform after them."""

_Coded = tuple['list[tuple[str, futures.Future[writer_lib.EncodedRecord]]]', Any]
"""The same while they are coded: the name and the future of each record."""


class Encoder:
  """Encodes a source with a preset, beside a base or None.

  `counts` has the elements and bytes of each record before it is rewritten, by its
  name, in the order of the file. Records may be divided among several files unless they
  are one message.
  """

  def __init__(
    self,
    source: passes.Source,
    preset: presets.Preset,
    *,
    base: base_lib.Base | None = None,
    files: Mapping[str, bytes] | None = None,
    stem: str | None = None,
  ):
    """Checks, before the work, that the preset suits the source; see `api.encode`."""
    self.can_be_divided = preset.coder != paper.CODER
    if self.can_be_divided:
      coders.find(preset.coder)
    if preset.rounding is None and isinstance(source, models.Model):
      source = source.rounded()  # other presets round at the end
    self.source, self.preset, self.base = source, preset, base
    self._files, self._stem = dict(files or {}), stem
    self._headers = source.headers if isinstance(source, checkpoints.PlainFiles) else {}
    self._recipe = None if base is None else self._find_recipe(base)
    if base is not None and self._recipe is None:
      self._check_base(base)
    self._records: Any = self._recipe or source
    self._check_content()
    self._context = self._made_context()
    if not self.can_be_divided:
      # The context is made of its config.
      paper.refuse(self._records)
    dtypes = self._context.dtypes if self._context else {}
    specs, names = self._records.specs, self._records.records
    self.counts = {name: _counts(specs(name), dtypes) for name in names}

  @property
  def elements(self) -> int:
    """How many elements the source has."""
    return sum(counts.elements for counts in self.counts.values())

  def nbytes(self, records: Sequence[str]) -> int:
    """Returns the bytes of records before they are coded."""
    return sum(self.counts[name].bytes for name in records)

  def fingerprint(self) -> str:
    """Returns a digest of the source and of everything else that decides the bytes."""
    preset, base = self.preset, self.base
    inputs = [self.source, *([] if base is None else [base.source])]
    value = [
      *(preset.name, preset.options, preset.keeps, preset.coder, self._stem),
      *map(sources.fingerprint, inputs),
      {x: hashlib.sha256(y).hexdigest() for x, y in self._files.items()},
      *(rotbits_jax.__version__, jax.__version__),
      # Another processor rounds bases in another way.
      None if self._recipe is None else platform.node(),
    ]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

  def in_memory(self, *, progress: bool) -> bytes:
    """Encodes the whole source; returns the bytes of the file."""
    buffer, records = io.BytesIO(), tuple(self.counts)
    size = self.nbytes(records)
    with progress_lib.Progress('encode', size, 'B', show=progress) as bar:
      self.write(buffer, records, bar)
    return buffer.getvalue()

  def write(
    self,
    file: BinaryIO,
    records: Sequence[str],
    bar: progress_lib.Progress,
    state: Any = None,
  ) -> Any:
    """Writes records, which follow each other, to an empty file.

    If the state of the transform before them is not given, the layers before them are
    gone through. The result is the state after them.
    """
    is_last, preset = records[-1:] == tuple(self.counts)[-1:], self.preset
    streams = list(records)
    if not self.can_be_divided:
      records = [name for name in records if name == models.names.BUFFERS]
      streams = [*paper.STREAMS, *records]
    writer = writer_lib.FileWriter(
      file,
      streams,
      files=self._files if is_last else {},
      headers=self._headers if is_last else {},
      preset=preset.name,
      options=preset.options,
      keeps=preset.keeps,
      config=self.source.config,
      stem=self._stem,
      dtypes=self._dtypes(),
    )
    bar.stage('reading, compiling')
    if not self.can_be_divided:
      self._write_message(writer, bar)
    for coded, reached in self._coded(records, state):
      bar.stage('encoding')
      for name, encoded in coded:
        writer.add(*encoded.result())
        bar.update(self.counts[name].bytes)
      state = reached
    writer.finish()
    return state

  # ---- checks ------------------------------------------------------------------------

  def _made_context(self) -> passes.Context | None:
    """Returns the context of the transform; None for arrays of no known family."""
    source: Any = self.source
    if source.config is not None:
      return passes.make_context(self._records)
    if self.preset.keeps == 'function':
      reason = getattr(source, 'reason', None)
      raise checkpoints.UnsupportedError(
        f'{f"{reason}; " if reason else ""}the preset {self.preset.name!r} needs a '
        'model of a known family; the presets exact and near store plain arrays'
      )
    return None

  def _find_recipe(self, base: base_lib.Base) -> recipe_lib.Recipe | None:
    """Returns the model as products with the base; None if it was not sliced from it.

    The transforms of the preset are left out then, because they would choose other
    coordinates.
    """
    preset, is_exact = self.preset, self.preset.keeps == 'bits'
    takes = preset.resumable and (is_exact or preset.name == 'free')
    if not takes or not recipe_lib.suits(self.source, base):
      return None
    recipe = recipe_lib.Recipe(self.source, base, keeps_bits=is_exact)
    if not recipe.is_related:
      return None
    transform = passes.chain()
    if not is_exact and recipe.obstacle:
      recipe = recipe_lib.Recipe(self.source, base, keeps_bits=True)
      transform = passes.chain(passes.remove_residual_gauge())  # notes why it does not
    rounding = None if is_exact else passes.NEAREST
    self.preset = preset._replace(transform=transform, rounding=rounding)
    return recipe

  def _check_base(self, base: base_lib.Base) -> None:
    """Checks that the preset keeps elements, and that the base has some arrays."""
    if self.preset.keeps != 'bits' or not self.can_be_divided:
      free = self.preset.name == 'free'
      why = ', because the model was not sliced from it' if free else ''
      raise ValueError(
        f'the preset {self.preset.name!r} takes no {"such " if free else ""}base{why}; '
        'the preset exact does'
      )
    specs = map(self.source.specs, self.source.records)
    base.check_shares([path for record in specs for path in structured.flatten(record)])

  def _check_content(self) -> None:
    """Checks the names of streams, and the paths, dtypes and shapes of parameters."""
    sizes = lambda contents: {name: len(x) for name, x in contents.items()}
    manifest_lib.check_files(self._stem, sizes(self._files), sizes(self._headers))
    source, config = self.source, self.source.config
    for name in source.records:
      specs = structured.flatten(source.specs(name))
      for path, leaf in specs.items():
        if not structured.is_structured(leaf):
          manifest_lib.check_array(path, tuple(leaf.shape), np.dtype(leaf.dtype))
      if config is not None:
        shapes = {path: tuple(leaf.shape) for path, leaf in specs.items()}
        manifest_lib.check_shapes(name, shapes, config)
    if config is not None:
      layers = map(models.names.layer, range(config.num_layers))
      expected = *models.outer_shapes(config), *layers
      if missing := [x for x in expected if x not in source.records]:
        raise ValueError(f'{missing[0]}: the model lacks it')

  # ---- records -----------------------------------------------------------------------

  def _dtypes(self) -> dict[str, str]:
    """Returns the dtypes of parameters that are float32 only in the file."""
    context, rounding = self._context, self.preset.rounding
    if context is None or rounding is None or not rounding.uniform:
      return {}
    dtypes = {
      path: dtype.name
      for path, dtype in context.dtypes.items()
      if dtype != context.dtype and jnp.issubdtype(dtype, jnp.floating)
    }
    return dtypes | {'': context.dtype.name}

  def _batches(self, names: Sequence[str], state: Any) -> Iterator[_Batch]:
    """Yields records; others than those in `names` may come, too."""
    bases: list[str] = []
    if self._context is not None:
      layers = [i for x in names if (i := models.names.layer_index(x)) is not None]
      outer = any(x in models.outer_shapes(self._context.config) for x in names)
      bases = [x for x in names if models.names.subspace_index(x) is not None]
      end = self._context.config.num_layers
      if layers or outer:
        for batch, reached in passes.rewrite(
          self._context,
          self.preset.transform,
          rounding=self.preset.rounding,
          layers=range(layers[0], layers[-1] + 1) if layers else range(end, end),
          state=state,
          outer=outer,
        ):
          state = reached
          yield self._with_bases(batch, bases), state
      names = [name for name in names if name == models.names.BUFFERS]
    for name in (*bases, *names):
      yield [self._record(name)], state

  def _with_bases(
    self, batch: list[passes.Record], bases: list[str]
  ) -> list[passes.Record]:
    """Returns a batch with the bases that come before its layers; takes them away."""
    places = {name: i for i, name in enumerate(self.counts)}
    records = []
    for record in batch:
      while bases and places[bases[0]] < places[record.name]:
        records.append(self._record(bases.pop(0)))
      records.append(record)
    return records

  def _record(self, name: str) -> passes.Record:
    """Returns a record that no transform rewrites."""
    params, rounding = self._records.read(name), self.preset.rounding
    if self._context is None and rounding is not None:
      flat: dict[str, Any] = {path: {} for path in structured.empty_dicts(params)}
      for path, leaf in structured.flatten(params).items():
        flat[path] = _rounded(rounding, path, leaf)
      params = structured.unflatten(flat)
    return passes.Record(name, params, [])

  def _coded(self, names: Sequence[str], state: Any) -> Iterator[_Coded]:
    """Codes records while the next ones are rewritten; see `write` for the state."""
    ahead = collections.deque[_Coded]()
    with pool.record_jobs() as start:
      for batch, reached in self._batches(names, state):
        resolve, records = self._resolver(batch), []
        while batch:
          record = batch.pop(0)  # its memory is freed when it is coded
          if record.name in names:
            job = functools.partial(
              writer_lib.encode_record,
              record,
              self.counts[record.name],
              resolve,
              self.preset.coder,
              self._recipe or self.base,
            )
            records.append((record.name, start(job)))
            del job
          del record
        ahead.append((records, reached))
        size = self.nbytes([name for name, _ in records])
        del records
        while len(ahead) > (0 if size >= memory.LARGE else 1):
          yield ahead.popleft()
      while ahead:
        yield ahead.popleft()

  def _resolver(self, batch: Sequence[passes.Record]) -> writer_lib.Resolve:
    """Returns the function that finds the parameters that leaves of a batch need."""
    flat: dict[str, Any] = {}
    for record in batch:
      flat |= structured.flatten(record.params)
    needs = {x for leaf in flat.values() for x in getattr(leaf, 'needs', ())}
    needed = {path: leaf for path, leaf in flat.items() if path in needs}

    def resolve(path: str) -> Any:
      if path in needed:
        return structured.materialize(needed[path])
      if self._context is not None:
        raise ValueError(f'the leaf needs {path}, which is not beside it')
      return sources.array_of(self.source, path)

    return resolve

  def _write_message(
    self, writer: writer_lib.FileWriter, bar: progress_lib.Progress
  ) -> None:
    """Writes the whole model as one message."""
    options = schema.load(paper.Options, self.preset.options, 'options')
    encoded = paper.encode(self._records, options, progress=not bar.disable)
    names = [name for name in self.counts if name != models.names.BUFFERS]
    elements, nbytes = sum(self.counts[x].elements for x in names), self.nbytes(names)
    writer.add_message(
      encoded.streams,
      layout=encoded.layout,
      input=manifest_lib.Counts(elements, nbytes),
      savings=(manifest_lib.SavingEntry(*encoded.saving),),
    )
    bar.update(nbytes)


def _rounded(rounding: passes.Rounding, path: str, leaf: Any) -> Any:
  """Rounds a matrix of no known model to a step by its root mean square."""
  dtype = np.dtype(leaf.dtype)
  is_float = dtype in (np.float16, ml_dtypes.bfloat16, np.float32)
  log2_step = rounding.log2_step(path, dtype)
  is_matrix = structured.is_plain(leaf) and passes.is_matrix(leaf)
  if log2_step is None or not is_float or not is_matrix:
    return leaf
  wide = jnp.asarray(leaf, jnp.float32)
  rounded, _ = passes.round_leaf(wide, dtype, log2_step, uniform=True)
  return structured.astype(passes.narrowed(jax.device_get(rounded)), dtype)


def _counts(specs: models.Params, dtypes: Mapping[str, np.dtype]) -> Any:
  """Returns the elements and bytes of a record; `dtypes` are those of its rounding."""
  elements = nbytes = 0
  for path, leaf in structured.flatten(specs).items():
    count = structured.count_elements(leaf)
    elements += count
    if path in dtypes:
      nbytes += count * dtypes[path].itemsize
    else:
      nbytes += structured.count_bytes(leaf)
  return manifest_lib.Counts(elements, nbytes)
