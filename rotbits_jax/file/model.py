"""Models on their way to a file: a job rewrites layers and writes them as units."""

from collections.abc import Mapping, Sequence
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.system import progress as progress_lib

Tree = dict[str, Any]


class Job:
  """The work of encoding a model to one or several files."""

  def __init__(
    self,
    source: Any,
    preset: presets.Preset,
    files: Mapping[str, bytes] | None,
    stem: str | None,
    mesh: jax.sharding.Mesh | None,
  ):
    if isinstance(source, models.Model):
      _check_leaves(source)
    self.source, self.preset = source, preset
    self.files = dict(getattr(source, 'files', {}) if files is None else files)
    stem = getattr(source, 'stem', None) if stem is None else stem
    writer_lib.check_files(self.files, *([] if stem is None else [stem]))
    self.buffers = dict(source.buffers)
    stored_as = getattr(source, 'stored_as', None)
    if stored_as is not None and preset.rounding is None:
      # Other presets round numbers at the end, so they use them before that.
      source, stored_as = source.rounded(), None
    is_uniform = preset.rounding is not None and preset.rounding.uniform
    self.context = passes.make_context(
      source, stored_as=stored_as, mesh=mesh
    )
    if is_uniform:
      options = preset.options | _dtypes(self.context)
      preset = preset._replace(options=options)
    self.summary = writer_lib.Summary(preset, source.config, stem)
    self.sizes = _input_sizes(self.context, self.buffers)
    if preset.message is not None:
      preset.message.refuse(source)

  @property
  def total(self) -> int:
    return len(self.sizes)

  def fingerprint(self, shards: Sequence[shards_lib.Shard]) -> str | None:
    """Returns a hash of everything that determines the bytes of the output.

    Returns None if a run cannot be resumed.
    """
    preset = self.preset
    if not isinstance(self.source, checkpoints.CheckpointReader):
      return None
    if not preset.resumable:
      return None
    parts = [
      self.source.fingerprint(),
      preset.name,
      preset.options,
      shards,
      rotbits_jax.__version__,
      jax.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def write(
    self,
    shards: Sequence[shards_lib.Shard],
    open_shard: Any,
    work: writer_lib.Workspace | None,
    bar: progress_lib.Progress,
  ) -> None:
    """Writes shards that follow each other.

    Args:
      shards: the shards in order.
      open_shard: takes a shard; returns its file.
      work: holds the units of an earlier run, and records those of this one; None if
        the run cannot be resumed.
      bar: shows the progress.
    """
    if not shards:
      return
    writers: dict[str, writer_lib.FileWriter] = {}
    home: dict[str, shards_lib.Shard] = {}
    last = list(self.sizes)[-1]
    for shard in shards:
      files = self.files if last in shard.units else {}
      units = shard.units
      if self.preset.message is not None:
        units = tuple(name for name in units if name == manifest_lib.BUFFERS)
      writer = writer_lib.FileWriter(open_shard(shard), self.summary, units, files)
      writers[shard.name] = writer
      home |= dict.fromkeys(shard.units, shard)
    if self.preset.message is not None:
      self._write_message(writers[shards[0].name], bar)
    else:
      self._write_units(writers, home, work, bar)
    if manifest_lib.BUFFERS in home:
      writer = writers[home[manifest_lib.BUFFERS].name]
      unit = passes.Record(
        manifest_lib.BUFFERS, {manifest_lib.BUFFERS: self.buffers}, []
      )
      writer.add(unit, self.sizes[manifest_lib.BUFFERS], {})
      bar.update()
    for writer in writers.values():
      writer.finish()

  def _write_units(
    self,
    writers: dict[str, writer_lib.FileWriter],
    home: dict[str, shards_lib.Shard],
    work: writer_lib.Workspace | None,
    bar: progress_lib.Progress,
  ) -> None:
    names = [name for name in home if name != manifest_lib.BUFFERS]
    kept, state = 0, None
    if work is not None and work.done:
      kept = self._keep(writers, names, work)
      bar.update(kept)
      if kept and work.state is not None:
        leaves, structure = jax.tree.flatten(self.preset.transform.init(self.context))
        if len(leaves) == len(work.state):
          state = jax.tree.unflatten(structure, work.state)
    own = [models.names.layer_index(name) for name in names]
    layers = [index for index in own if index is not None]
    outer = [name for name, index in zip(names, own, strict=True) if index is None]
    start = layers[0] + min(kept, len(layers)) if layers else self.config.num_layers
    stop = layers[-1] + 1 if layers else self.config.num_layers
    if kept == len(names):
      return
    rewritten = passes.rewrite(
      self.context,
      self.preset.transform,
      rounding=self.preset.rounding,
      layers=range(start, stop),
      state=state,
      outer=bool(outer),
    )
    bar.stage('rewriting')
    for units, state in rewritten:
      beside = {key: x for unit in units for key, x in unit.params.items()}
      bar.stage('coding')
      noted: dict[shards_lib.Shard, list[manifest_lib.Record]] = {}
      while units:
        unit = units.pop(0)
        if unit.name not in home:  # another process writes it
          continue
        shard = home[unit.name]
        entry = writers[shard.name].add(unit, self.sizes[unit.name], beside)
        noted.setdefault(shard, []).append(entry)
        bar.update()
      if work is not None:
        work.note(noted, state)
      bar.stage('rewriting')

  @property
  def config(self) -> models.ModelConfig:
    return self.context.config

  def _keep(
    self,
    writers: dict[str, writer_lib.FileWriter],
    names: Sequence[str],
    work: writer_lib.Workspace,
  ) -> int:
    """Keeps the first units of an earlier run that are undamaged; returns how many."""
    for count, (shard, entry) in enumerate(work.done):
      fits = count < len(names) and entry.name == names[count] and shard in writers
      if not fits or not writers[shard].keep(entry):
        work.forget(count)
        return count
    return len(work.done)

  def _write_message(
    self, writer: writer_lib.FileWriter, bar: progress_lib.Progress
  ) -> None:
    assert self.preset.message is not None
    name, corrections, tables = manifest_lib.MESSAGE
    encoded = self.preset.message.encode(
      self.context.source,
      spill=lambda words: writer.extend(name, words),
      progress=bar.shown,
    )
    streams = [writer.close(name)]
    for other, data in ((corrections, encoded.corrections), (tables, encoded.tables)):
      writer.extend(other, data)
      streams.append(writer.close(other))
    saving = passes.Saving(
      self.preset.names[0], 0, int(encoded.net_bits // 8), list(encoded.notes)
    )
    own = [x for name, x in self.sizes.items() if name != manifest_lib.BUFFERS]
    writer.set_message(
      manifest_lib.Message(
        layout=encoded.layout,
        streams=tuple(streams),
        input_numbers=sum(sizes.numbers for sizes in own),
        input_bytes=sum(sizes.bytes for sizes in own),
        savings=(saving,),
      )
    )
    bar.update(len(own))


def _check_leaves(model: models.Model) -> None:
  """Checks the structured leaves of a model, see `writer.check_leaf`.

  `UniformlyQuantized` are not checked, because `rewrite` takes their arrays.

  Raises:
    ValueError: naming a parameter that would not come back.
  """
  kept = lambda tree: {
    path: leaf
    for path, leaf in structured.flatten(tree).items()
    if structured.is_structured(leaf)
    and not isinstance(leaf, structured.UniformlyQuantized)
  }
  outer = structured.flatten(model.outer())
  for path, leaf in kept(model.params).items():
    # The arrays of a packed leaf do not tell how many layers there are.
    if path in outer or isinstance(leaf, structured.Packed):
      writer_lib.check_leaf(path, leaf)
    if isinstance(leaf, structured.Dependent):
      needed = [outer[name] for name in leaf.needs if name in outer]
      shapes = [x.shape for x in needed if not isinstance(x, structured.Dependent)]
      if path not in outer or len(shapes) < len(leaf.needs):
        raise ValueError(f'{path}: the leaf needs {", ".join(leaf.needs)} beside it')
      try:
        leaf.check_needed(*shapes)
      except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
  for layers in model.stacks:
    for path, leaf in kept(model.params[models.names.stack(layers)]).items():
      for place, index in enumerate(layers):
        writer_lib.check_leaf(models.names.prefix(index) + path, leaf, place)


def _dtypes(context: passes.Context) -> Tree:
  """Returns the dtypes of the source as options, see `manifest.DTYPE`."""
  others = {
    path: dtype.name
    for path, dtype in context.dtypes.items()
    if dtype != context.dtype and jnp.issubdtype(dtype, jnp.floating)
  }
  most = {manifest_lib.DTYPE: context.dtype.name}
  return most | ({manifest_lib.OTHER_DTYPES: others} if others else {})


def _input_sizes(
  context: passes.Context, buffers: Mapping[str, Any]
) -> dict[str, writer_lib.Sizes]:
  """Returns the size of each unit before it is rewritten, in the order of the units."""
  trees: dict[str, tuple[str, Tree]] = {}
  for i in range(context.config.num_layers):
    trees[models.names.layer(i)] = models.names.prefix(i), context.source.specs(i)
  for key, tree in context.source.specs(None).items():
    trees[key] = '', {key: tree}
  sizes = {}
  for name, (prefix, tree) in trees.items():
    numbers = nbytes = 0
    for path, leaf in structured.flatten(tree).items():
      count = structured.count_elements(leaf)
      numbers += count
      nbytes += count * context.dtypes[prefix + path].itemsize
    sizes[name] = writer_lib.Sizes(numbers, nbytes)
  if buffers:
    arrays = [np.asarray(x) for x in buffers.values()]
    count, nbytes = sum(x.size for x in arrays), sum(x.nbytes for x in arrays)
    sizes[manifest_lib.BUFFERS] = writer_lib.Sizes(count, nbytes)
  return sizes
