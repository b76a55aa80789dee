"""The work of encoding a source to one file or several."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import functools
import hashlib
import json
import platform
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import coders
from rotbits_jax.file import decode as decode_lib
from rotbits_jax.file import journal as journal_lib
from rotbits_jax.file import leaves as leaves_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import sources
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import recipe as recipe_lib
from rotbits_jax.system import progress as progress_lib
from rotbits_jax.system import schema

Batch = tuple[list[passes.Record], Any]


class _Coded(NamedTuple):
  """A batch that is being coded.

  Attributes:
    records: the name of each record, and the future of its entry and its stream.
    sources: checksums of the source's records up to this batch.
    state: the state of the transform after the batch.
  """

  records: 'list[tuple[str, futures.Future[writer_lib.EncodedRecord]]]'
  sources: dict[str, int]
  state: Any


class Job:
  """The work of encoding a source.

  Attributes:
    source: the input.
    preset: the preset.
    base: the base beside which arrays are stored; None for none.
    counts: elements and bytes of each record before it is rewritten, by its name, in
      the order of the file.
  """

  def __init__(
    self,
    source: sources.Source,
    preset: presets.Preset,
    base: base_lib.Base | None = None,
  ):
    """Checks the source, before the work.

    Args:
      source: the input.
      preset: how to encode it.
      base: see the class.

    Raises:
      ValueError: if the preset does not suit the source or the base, if the source
        cannot be stored, or if the base has none of its arrays.
    """
    if preset.coder != paper.CODER and coders.find(preset.coder) is None:
      raise ValueError(f'there is no coder of the name {preset.coder!r}')
    if preset.rounding is None:
      source = source.rounded()  # other presets round at the end
    self.preset, self.source, self.base = preset, source, base
    self._recipe = None if base is None else self._find_recipe(base)
    if base is not None and self._recipe is None:
      self._check_base(base)
    self._records: Any = self._recipe or source
    writer_lib.check_source(source, self._streams(self._records.records))
    if source.config is not None:
      config, outer = source.config, models.outer_shapes(source.config)
      layers = map(models.names.layer, range(config.num_layers))
      given = {*source.records}
      if missing := [x for x in (*outer, *layers) if x not in given]:
        raise ValueError(f'{missing[0]}: the model lacks it')
    for name in source.records:
      self._check_record(name)
    self._context = self._made_context()
    if preset.coder == paper.CODER:
      paper.refuse(source)
    dtypes = self._context.dtypes if self._context else {}
    specs, names = self._records.specs, self._records.records
    self.counts = {name: _counts(specs(name), dtypes) for name in names}

  @property
  def divides(self) -> bool:
    """Whether the records may be divided among several files."""
    return self.preset.coder != paper.CODER

  @property
  def is_fitted(self) -> bool:
    """Whether records depend on bases, which other machines may fit in other bits."""
    return self._recipe is not None

  def fingerprint(self, shards: Sequence[shards_lib.Shard]) -> str | None:
    """Returns a hash of everything that determines the bytes, but for the elements.

    Returns None if a run cannot be resumed.
    """
    preset = self.preset
    own = self.source.fingerprint() if preset.resumable else None
    if own is None:
      return None
    base = None if self.base is None else self.base.fingerprint()
    if self.base is not None and base is None:
      return None
    parts = [own, base, preset.name, preset.options, preset.keeps, preset.coder, shards]
    versions = [rotbits_jax.__version__, jax.__version__]
    if self.is_fitted:  # another processor rounds bases in another way
      versions.append(platform.node())
    return hashlib.sha256(json.dumps([*parts, *versions]).encode()).hexdigest()

  def write(
    self,
    shards: Sequence[shards_lib.Shard],
    open_shard: Callable[[shards_lib.Shard], BinaryIO],
    bar: progress_lib.Progress,
    journal: journal_lib.Journal | None = None,
  ) -> None:
    """Writes shards whose records follow each other.

    Args:
      shards: the shards in order.
      open_shard: takes a shard; returns its file.
      bar: shows the progress.
      journal: has the records of an earlier run, and gets those of this one; None if
        the run cannot be resumed.
    """
    writers: dict[str, writer_lib.FileWriter] = {}
    home: dict[str, str] = {}
    for shard in shards:
      is_last = shard.records[-1:] == tuple(self.counts)[-1:]
      writers[shard.name] = writer_lib.FileWriter(
        open_shard(shard),
        self._streams(shard.records),
        sum(self.counts[name].bytes for name in shard.records),
        self.source if is_last else None,
        **self._facts(),
      )
      home |= dict.fromkeys(shard.records, shard.name)
    kept, known = self._keep(writers, list(home), journal) if journal else (0, None)
    bar.update(sum(self.counts[name].bytes for name in list(home)[:kept]))
    waiting = list(home)[kept:]
    if not self.divides:
      (writer,) = writers.values()
      self._write_message(writer, bar)
      waiting = [name for name in waiting if name == models.names.BUFFERS]
    bar.stage('reading, compiling')
    for batch in self._coded(waiting, known):
      bar.stage('encoding')
      written = []
      for name, coded in batch.records:
        written.append((home[name], writers[home[name]].add(*coded.result())))
        bar.update(self.counts[name].bytes)
      if journal is not None and written:
        journal.note(written, batch.sources, batch.state)
    for writer in writers.values():
      writer.finish()

  def _made_context(self) -> passes.Context | None:
    """Returns the context of the transform; None for arrays of no known family."""
    source: Any = self.source
    preset = self.preset
    if source.config is None:
      if preset.keeps != 'bits':
        why = source.reason
        raise checkpoints.UnsupportedError(
          f'{f"{why}; " if why else ""}the preset {preset.name!r} needs a model of a '
          'known family; the preset exact stores plain arrays'
        )
      return None
    return passes.make_context(self._records, stored_as=source.stored_as)

  def _find_recipe(self, base: base_lib.Base) -> recipe_lib.Recipe | None:
    """Returns the model as products with the base; None if it was not sliced from it.

    The transforms of the preset are left out then, because they would choose other
    coordinates.
    """
    preset, is_exact = self.preset, self.preset.keeps == 'bits'
    takes = preset.resumable and (is_exact or preset.name == 'free')
    if not takes or not recipe_lib.suits(self.source, base):
      return None
    found = recipe_lib.Recipe(self.source, base, keeps_bits=is_exact)
    if not found.is_related:
      return None
    rounding = None if is_exact else passes.NEAREST
    transform = passes.chain()
    if not is_exact and found.obstacle:
      found = recipe_lib.Recipe(self.source, base, keeps_bits=True)
      transform = passes.chain(passes.remove_residual_gauge())  # notes why it does not
    self.preset = preset._replace(transform=transform, rounding=rounding)
    return found

  def _check_base(self, base: base_lib.Base) -> None:
    """Checks that arrays can be stored beside a base.

    Raises:
      ValueError: if the preset changes elements, or if the base has none of the arrays.
    """
    if self.preset.keeps != 'bits' or not self.divides:
      free = self.preset.name == 'free'
      why = ', because the model was not sliced from it' if free else ''
      raise ValueError(
        f'the preset {self.preset.name!r} takes no {"such " if free else ""}base{why}; '
        'the preset exact does'
      )
    specs = map(self.source.specs, self.source.records)
    base.check_shares([path for own in specs for path in structured.flatten(own)])

  def _check_record(self, name: str) -> None:
    """Checks, before the work, that parameters would come back.

    Raises:
      ValueError: naming a parameter that would not.
    """
    source, specs = self.source, structured.flatten(self.source.specs(name))
    for path, leaf in specs.items():
      if not structured.is_structured(leaf):
        leaves_lib.check_array(path, tuple(leaf.shape), np.dtype(leaf.dtype))
    if source.config is not None:
      shapes = {path: tuple(leaf.shape) for path, leaf in specs.items()}
      manifest_lib.check_shapes(name, shapes, source.config)
    if source.is_on_disk or not any(map(structured.is_structured, specs.values())):
      return
    for path, leaf in structured.flatten(source.read(name)).items():
      if not structured.is_structured(leaf):
        continue
      writer_lib.entry_of(path, leaf, self.source.resolve)
      if isinstance(leaf, structured.Basis | structured.Subspace):
        raise ValueError(f'{path}: it cannot be stored: a basis needs a recipe')
      if source.config is not None and leaf.needs:
        try:
          leaf.check_needed(*(self.source.resolve(x).shape for x in leaf.needs))
        except ValueError as error:
          raise ValueError(f'{path}: {error}') from error

  def _facts(self) -> dict[str, Any]:
    """Returns the fields of the manifest that all shards share."""
    preset, context = self.preset, self._context
    dtypes: dict[str, str] = {}
    rounding = preset.rounding
    if context is not None and rounding is not None and rounding.uniform:
      # The parameters are float32 in the file.
      dtypes = {
        path: dtype.name
        for path, dtype in context.dtypes.items()
        if dtype != context.dtype and jnp.issubdtype(dtype, jnp.floating)
      }
      dtypes[''] = context.dtype.name
    return {
      'preset': preset.name,
      'options': preset.options,
      'keeps': preset.keeps,
      'config': self.source.config,
      'stem': self.source.stem,
      'dtypes': dtypes,
    }

  def _streams(self, records: Sequence[str]) -> list[str]:
    """Returns the names of the streams of records."""
    if self.divides:
      return list(records)
    return [*paper.STREAMS, *(x for x in records if x == models.names.BUFFERS)]

  def _batches(self, names: Sequence[str], state: Any) -> Iterator[Batch]:
    """Yields records, and the state of the transform after them.

    Args:
      names: the records that are wanted, in order. Others may come, too.
      state: the state before them; None if it is unknown.
    """
    layers = [i for x in names if (i := models.names.layer_index(x)) is not None]
    bases, others = [], list(names)
    if self._context is not None:
      known = models.outer_shapes(self._context.config)
      outer = any(name in known for name in names)
      index = models.names.subspace_index
      bases = [name for name in names if index(name) is not None]
      others = [name for name in names if name == models.names.BUFFERS]
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
    for name in (*bases, *others):
      yield [self._record(name)], state

  def _with_bases(self, batch: list[passes.Record], bases: list[str]) -> Any:
    """Returns a batch with the bases that come before its layers; takes them away."""
    if not bases:
      return batch
    found, places = [], {name: i for i, name in enumerate(self.counts)}
    for record in batch:
      while bases and places[bases[0]] < places[record.name]:
        found.append(self._record(bases.pop(0)))
      found.append(record)
    return found

  def _record(self, name: str) -> passes.Record:
    given = self._records.read(name)
    return passes.Record(name, given, [])

  def _coded(self, waiting: Sequence[str], known: Any) -> Iterator[_Coded]:
    """Codes records while the next ones are rewritten.

    Args:
      waiting: the records that are wanted, in order.
      known: the state of the transform before them; None if it is unknown.
    """
    ahead = collections.deque[_Coded]()
    with weights.record_jobs() as start:
      for batch, state in self._batches(waiting, known):
        resolve, records = self._resolver(batch), []
        while batch:
          record = batch.pop(0)  # its memory is freed when it is coded
          if record.name in waiting:
            counts, coder = self.counts[record.name], self.preset.coder
            own = record, counts, resolve, coder, self._recipe or self.base
            job = functools.partial(writer_lib.encode_record, *own)
            records.append((record.name, start(job)))
            del record, own, job
        ahead.append(_Coded(records, dict(self.source.checksums), state))
        size = sum(self.counts[name].bytes for name, _ in records)
        del records
        while len(ahead) > (0 if size >= decode_lib.LARGE else 1):
          yield ahead.popleft()
      while ahead:
        yield ahead.popleft()

  def _resolver(self, batch: Sequence[passes.Record]) -> writer_lib.Resolve:
    """Returns the function that finds the parameters that leaves of a batch need."""
    flat: dict[str, Any] = {}
    for record in batch:
      flat |= structured.flatten(record.params)
    needs = {x for leaf in flat.values() for x in getattr(leaf, 'needs', ())}
    beside = {path: leaf for path, leaf in flat.items() if path in needs}

    def resolve(path: str) -> Any:
      if path in beside:
        return structured.materialize(beside[path])
      if self._context is not None:
        raise ValueError(f'the leaf needs {path}, which is not beside it')
      return self.source.resolve(path)

    return resolve

  def _keep(
    self,
    writers: Mapping[str, writer_lib.FileWriter],
    names: Sequence[str],
    journal: journal_lib.Journal,
  ) -> tuple[int, Any]:
    """Keeps the first records of an earlier run that still hold.

    Returns:
      How many these are; and the state after them, or None if it is unknown.
    """
    if self._recipe and not self._recipe.holds([x.record for x in journal.done]):
      journal.forget(0)
    kept = len(journal.done)
    for i, (entry, name) in enumerate(zip(journal.done, names, strict=False)):
      is_same = entry.record.name == name and self.source.holds(entry.sources)
      is_same = is_same and (self.base is None or self.base.holds(entry.record))
      if not is_same or not writers[entry.shard].keep(entry.record):
        journal.forget(i)
        kept = i
        break
    if not kept or journal.state is None or self._context is None:
      return kept, None
    expected = self.preset.transform.init(self._context)
    leaves, structure = jax.tree.flatten(expected)
    kinds = [[(x.ndim, x.dtype) for x in y] for y in (leaves, journal.state)]
    if kinds[0] != kinds[1]:
      return kept, None
    return kept, jax.tree.unflatten(structure, jax.device_put(journal.state))

  def _write_message(
    self, writer: writer_lib.FileWriter, bar: progress_lib.Progress
  ) -> None:
    """Writes the whole model as one message."""
    source: Any = self.source
    options = schema.load(paper.Options, self.preset.options, 'options')
    encoded = paper.encode(source, options, progress=not bar.disable)
    saving = manifest_lib.SavingEntry(**encoded.saving._asdict())
    own = [x for name, x in self.counts.items() if name != models.names.BUFFERS]
    writer.add_message(
      encoded.streams,
      layout=encoded.layout,
      input=manifest_lib.Counts(
        elements=sum(x.elements for x in own), bytes=sum(x.bytes for x in own)
      ),
      savings=(saving,),
    )
    bar.update(sum(x.bytes for x in own))


def _counts(specs: models.Params, dtypes: Mapping[str, np.dtype]) -> Any:
  """Returns the elements and bytes of a record before it is rewritten.

  Args:
    specs: shapes and dtypes of its parameters.
    dtypes: dtypes to which parameters are rounded at the end, by path.
  """
  elements = nbytes = 0
  for path, leaf in structured.flatten(specs).items():
    count = structured.count_elements(leaf)
    dtype = dtypes.get(path)
    elements += count
    nbytes += structured.count_bytes(leaf) if dtype is None else count * dtype.itemsize
  return manifest_lib.Counts(elements=elements, bytes=nbytes)
