"""Estimates of the bytes that presets take, from samples of a checkpoint.

The coder's own plans give the bytes of a sample, `coding.weights.estimate`; nothing is
coded. For the preset `exact` a sample is some rows of each tensor of a few layers. Two
samples of different sizes tell the cost of a row, and that of an array however many
rows it has, such as its frequency tables.

`free` and `near` change coordinates. So they rewrite a small model that is cut out of
the same layers: in each of them a few heads and neurons, and a few tokens. The bytes of
each of its tensors then stand for those of the whole. A residual stream of more than
768 coordinates is cut to 512, because decompositions would take too long. Then a
shortcut counts as one of full rank. Whether the embedding of a sliced model still
follows from the head is found in a few of its columns.

Most of the time is the compilation of programs. So arrays of the small model have few
sizes. Meanwhile other threads plan the samples for `exact`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple
import zlib

import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import sources
from rotbits_jax.passes import tied
from rotbits_jax.presets import steps
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.relative import measure as relative
from rotbits_jax.relative import recipe
from rotbits_jax.system import progress as progress_lib

Opened = checkpoints.CheckpointReader | checkpoints.TensorFiles

_RECORDS = 3  # of one kind that are read
_ELEMENTS = 1 << 18  # of a sample
_LAYERS = 4  # of the model that is cut out
_PART = 1 << 18  # the greatest number of elements of one of its matrices, about
_TOKENS = 1024  # of its vocabulary
_WIDE, _CUT = 768, 512  # a wider residual stream is cut to this width
_ENTRY = 30  # bytes of a tensor's entry in the manifest, about
_NOTE = 20  # bytes of the notes of a tensor that is rewritten
_EMBED = 'embed/tokens'
_RESIDUAL, _INTEGER = 2.0, 13.2  # bits of a tied element, on OPT


class Estimate(NamedTuple):
  """The cost of a checkpoint that is stored by a preset.

  Attributes:
    preset: name of the preset.
    nbytes: the estimated size of the file.
    seconds: about how long two cores take to write it.
    memory: about how many bytes of memory that takes.
  """

  preset: str
  nbytes: int
  seconds: float
  memory: int


# By "How large may a model be?" and "How cost grows with size" in RESULTS.md.
_CODED = 1.5e8  # bytes that are coded in a second
_ROTATED = 4e10  # elements times width that are rewritten in a second
_LEAST_MEMORY = 1 << 28
_MOST_RECORDS = {True: 8, False: 16}  # in memory, as bytes: exact, or rewritten


def estimate(
  opened: Opened, *, base: Any = None, progress: bool = False
) -> tuple[list[Estimate], str | None]:
  """Estimates the size of the file that each preset would write.

  Args:
    opened: the checkpoint, as `checkpoints.open_any` opens it.
    base: see `api.encode`; with it there is one more estimate, of `exact` beside it.
      There is none for a sliced model beside its dense one, where only the work itself
      tells.
    progress: whether to show the progress on stderr.

  Returns:
    The estimates; and why there are none of `free` and `near`, or None if there are.

  Raises:
    CheckpointError: if a file has changed or is damaged.
    ValueError: if the base cannot be opened or has none of the tensors.
  """
  found, why = None, None
  if base is not None:
    found = reader_lib.open_base(base, plain=opened.config is None)
    found.check_shares(_specs(opened))
  if isinstance(opened, checkpoints.TensorFiles):
    why = opened.reason or 'it is of no known family'
  elif any(map(structured.is_structured, _specs(opened).values())):
    why = 'the weights are products of factors'
  cutter = None
  if why is None and isinstance(opened, checkpoints.CheckpointReader):
    cutter = _Cutter(opened)
  groups = _groups(opened, {} if cutter is None else cutter.records)
  count = sum(map(len, groups)) + (0 if cutter is None else 2)
  with (
    progress_lib.Progress('estimate', count, 'part', show=progress) as bar,
    weights.record_jobs() as start,
  ):
    rest = start(functools.partial(overhead, opened))
    bar.stage('exact')
    planned = []
    for record, likes in itertools.chain.from_iterable(x.items() for x in groups):
      given = opened.read(record)
      sampled = _sampled(structured.flatten(given), found)
      planned.append((start(functools.partial(_of_record, sampled)), likes))
      if cutter is not None:
        cutter.add(record, given)
      del given
      bar.update()
    sized: dict[str, float] = {}
    if cutter is not None:
      bar.stage('free, near')
      cut = cutter.made(start)
      others = [presets.free(), presets.near()]
      for preset, size in zip(others, cut.sizes(others, start), strict=True):
        sized[preset.name] = sum(rest.result()) + size
      bar.update()
    sizes = (x.result() * likes for x, likes in planned)
    alone, both = rest.result()[0] + sum(sizes, np.zeros(2))
    if cutter is not None:
      alone -= cut.predictable()
      bar.update()
  exact = {'exact': alone}
  if found is not None and not recipe.suits(sources.Source(opened), found):
    exact['exact --base'] = both
  return [_with_needs(opened, *x) for x in (exact | sized).items()], why


def _with_needs(opened: Opened, preset: str, size: float) -> Estimate:
  """Adds about the seconds and the memory that writing the file takes."""
  is_exact = preset.startswith('exact')
  seconds = tensor_bytes(opened) / _CODED
  if not is_exact and opened.config is not None:
    elements = sum(x.size for x in _specs(opened).values())
    seconds += elements * opened.config.hidden_size / _ROTATED
  of_records = (structured.flatten(opened.specs(x)).values() for x in opened.records)
  largest = max((sum(map(structured.count_bytes, x)) for x in of_records), default=0)
  memory = _LEAST_MEMORY + _MOST_RECORDS[is_exact] * largest
  return Estimate(preset, round(size), seconds, memory)


def _specs(opened: Opened | sources.Source) -> dict[str, Any]:
  """Returns the shapes of all parameters by path; nothing is read."""
  specs: dict[str, Any] = {}
  for record in opened.records:
    specs |= structured.flatten(opened.specs(record))
  return specs


def tensor_bytes(opened: Opened) -> int:
  """Returns the bytes of all tensors."""
  return sum(structured.count_bytes(x) for x in _specs(opened).values())


def elements(opened: Opened) -> int:
  """Returns how many elements the tensors have."""
  return sum(map(structured.count_elements, _specs(opened).values()))


def overhead(opened: Opened | sources.Source) -> tuple[int, int]:
  """Returns about how many bytes a file has besides its tensors.

  Returns:
    The bytes, and those of notes on how tensors were rewritten.
  """
  files = sum(len(zlib.compress(x)) for x in opened.files.values())
  count = len(_specs(opened))
  return files + _ENTRY * count, _NOTE * count


# ---- exact ---------------------------------------------------------------------------


def _groups(opened: Opened, records: Mapping[str, float]) -> list[dict[str, float]]:
  """Groups records with parameters of the same shapes, and chooses some of each group.

  Args:
    opened: the checkpoint.
    records: those that are chosen in any case, and for how many each of them stands.

  Returns:
    For each group, the records that are read, and how many each of them stands for.
  """
  groups: dict[tuple[Any, ...], list[str]] = {}
  for record in opened.records:
    specs = structured.flatten(opened.specs(record))
    key = tuple(
      (path.removeprefix(record), tuple(x.shape), np.dtype(x.dtype).name)
      for path, x in specs.items()
    )
    groups.setdefault(key, []).append(record)
  found = []
  for own in groups.values():
    chosen = {x: records[x] for x in own if x in records}
    chosen = chosen or dict.fromkeys(spread(own, _RECORDS), 1.0)
    total = sum(chosen.values())
    found.append({x: likes * len(own) / total for x, likes in chosen.items()})
  return found


def spread(items: Sequence[Any], most: int) -> list[Any]:
  """Returns at most so many items, at equal distances."""
  count = min(len(items), most)
  return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


class _Sample(NamedTuple):
  """Rows of an array that stand for it, beside those of another array or alone.

  Attributes:
    rows: how many rows the array has.
    parts: some of them, and half as many; or all of them. Each part has the same rows
      of both arrays.
  """

  rows: int
  parts: list[tuple[np.ndarray, ...]]

  @classmethod
  def of(cls, *arrays: np.ndarray) -> '_Sample':
    """Takes rows of arrays of one shape."""
    columns = (arrays[0].shape[-1] if arrays[0].ndim > 1 else 1) or 1
    whole = [x.reshape(-1, columns) for x in arrays]
    count = len(whole[0])
    many = max(_ELEMENTS // max(columns, 1), 64)
    if many >= count:
      return cls(count, [tuple(map(np.ascontiguousarray, whole))])
    places = [np.arange(n) * count // n for n in (many, many // 2)]
    return cls(count, [tuple(x[own] for x in whole) for own in places])

  def nbytes(self, size_of: Callable[..., float]) -> float:
    """Returns about the bytes of the array.

    Args:
      size_of: takes the same rows of both arrays, and returns bytes.
    """
    sizes = [float(size_of(*part)) for part in self.parts]
    if len(sizes) == 1:
      return sizes[0]
    many, few = (len(part[0]) for part in self.parts)
    return sizes[0] + (sizes[0] - sizes[1]) / (many - few) * (self.rows - many)


def _sampled(params: Mapping[str, Any], base: base_lib.Base | None) -> list[Any]:
  """Returns structured leaves of a record, and samples of its arrays."""
  found: list[Any] = []
  for path, leaf in params.items():
    if structured.is_structured(leaf):
      found.append(leaf)
      continue
    known = None if base is None else base.array(path)
    arrays = [np.asarray(leaf)]
    if known is not None and known.shape == leaf.shape:
      arrays.append(known)
    found.append(_Sample.of(*arrays))
  return found


def _of_record(sampled: Sequence[Any]) -> np.ndarray:
  """Returns about the bytes of a record: alone, and beside the base."""
  total = np.zeros(2)
  for own in sampled:
    alone = both = _size_of(own)
    if isinstance(own, _Sample) and len(own.parts[0]) > 1:
      both = min(alone, own.nbytes(_beside))
    total += alone, both
  return total


def _size_of(own: Any) -> float:
  """Returns about the bytes of a structured leaf or of a sampled array."""
  if isinstance(own, _Sample):
    return own.nbytes(lambda array, *_: weights.estimate([_stored(array)]))
  return weights.estimate(list(own.stored()[1].values()))


def of_leaf(leaf: Any) -> float:
  """Returns about the bytes of an array or a structured leaf."""
  return _size_of(
    leaf if structured.is_structured(leaf) else _Sample.of(np.asarray(leaf))
  )


def _stored(array: np.ndarray) -> np.ndarray:
  return array.view(entries.stored_dtype(array.dtype.name))


def _beside(array: np.ndarray, known: np.ndarray) -> float:
  leaf = relative.beside(array, known)
  arrays = [_stored(array)] if leaf is None else list(leaf.stored()[1].values())
  return weights.estimate(arrays)


# ---- free and near -------------------------------------------------------------------


class _Cutter:
  """Cuts a small model out of a checkpoint, whose records come in any order.

  Attributes:
    records: the layers that it takes, and for how many each of them stands.
  """

  def __init__(self, opened: checkpoints.CheckpointReader):
    self._config = opened.config
    layers, counts = _layers(opened.config)
    self._widths = _widths(opened.config, layers)
    self._chosen = _chosen(opened.config)
    names = map(models.names.layer, layers)
    self.records = dict(zip(names, counts, strict=True))
    self._axes = models.layout.outer_axes(opened.config)
    self._pieces: dict[str, models.Params] = {}
    self._outer: models.Params = {}
    self._shapes = {x: tuple(y.shape) for x, y in _specs(opened).items()}
    self._columns: dict[str, np.ndarray] = {}

  def add(self, record: str, given: models.Params) -> None:
    """Takes the rows and columns of a record that the small model has."""
    index, widths = models.names.layer_index(record), self._widths
    if record in self.records and index is not None:
      axes = models.layout.layer_axes(self._config)
      self._pieces[record] = _cut(given[record], axes, self._chosen, widths[index])
    elif index is None and record != models.names.BUFFERS:
      ends = widths[0][0], widths[max(widths)][-1]
      self._outer |= _cut(given, self._axes, self._chosen, ends)
      if self._config.sliced and self._config.hidden_size > _WIDE:
        self._columns |= structured.flatten(given)

  def made(self, start: weights.Start[Any]) -> '_CutOut':
    """Returns the model, when all records are there.

    Args:
      start: starts a job beside this thread.
    """
    config = self._config
    lengths = {x: len(y) for x, y in self._chosen.items()}
    part, places = _config(config, self._widths, lengths), range(len(self._widths))
    names = list(map(models.names.layer, places))
    given = dict(zip(names, self.records, strict=True))
    shapes, index = dict[str, tuple[int, ...]](), models.names.layer_index
    shapes |= {path: x for path, x in self._shapes.items() if index(path) is None}
    for name, record in given.items():
      for path in structured.flatten(self._pieces[record]):
        shapes[f'{name}/{path}'] = self._shapes[f'{record}/{path}']
    layers = [self._pieces[given[name]] for name in names]
    model = models.from_layers(part, self._outer, layers, {})
    is_tied = start(functools.partial(tied.is_tied, self._columns))
    counts = {name: self.records[record] for name, record in given.items()}
    return _CutOut(config, model, counts, shapes, is_tied)


class _CutOut(NamedTuple):
  """A small model that is cut out of a checkpoint.

  Attributes:
    config: config of the checkpoint.
    model: the model.
    counts: how many records of the checkpoint each of its layers stands
      for, by its name.
    shapes: the shapes in the checkpoint, by the path in the model.
    is_tied: whether the embedding follows from the head, but not that of the model,
      when that is known.
  """

  config: models.ModelConfig
  model: models.Model
  counts: dict[str, float]
  shapes: dict[str, tuple[int, ...]]
  is_tied: futures.Future[bool]

  def predictable(self) -> float:
    """Returns the bytes that `exact` saves of an embedding beside its head."""
    if self.is_tied.result():
      table = dict(self.model.leaves())[_EMBED]
      tokens, width = self.shapes[_EMBED]
      kept = tokens * width * _RESIDUAL + self.config.hidden_size * width * _INTEGER
      return max(self._size(_EMBED, table) - kept / 8, 0.0)
    if self.model.config.hidden_size < self.config.hidden_size:
      return 0.0
    none = range(self.model.config.num_layers, self.model.config.num_layers)
    before, saved = dict(self.model.leaves()), 0.0
    context, chain = passes.make_context(self.model), presets.exact().transform
    records = passes.rewrite(context, chain, rounding=None, layers=none)
    for path, leaf in flat(records).items():
      if structured.is_structured(leaf):
        saved += self._size(path, before[path]) - self._size(path, leaf)
    return saved

  def sizes(
    self, all_presets: Sequence[presets.Preset], start: weights.Start[Any]
  ) -> list[float]:
    """Returns the bytes that presets take, which rewrite with the same transforms.

    Args:
      all_presets: the presets.
      start: starts a job beside this thread.
    """
    context = passes.make_context(self.model)
    unrounded = context._replace(source=steps.rewritten(self.model))
    planned = []
    for preset in all_presets:
      records = passes.rewrite(unrounded, passes.chain(), rounding=preset.rounding)
      planned.append(
        {
          path: start(functools.partial(self._size, path, leaf))
          for path, leaf in flat(records).items()
        }
      )
    found = []
    for own in planned:
      sizes = {path: size.result() for path, size in own.items()}
      if self.is_tied.result():  # a matrix with a row for each coordinate stands for it
        sizes[_EMBED] *= self.config.hidden_size / self.shapes[_EMBED][0]
      found.append(sum(sizes.values()))
    return found

  def _size(self, path: str, leaf: Any) -> float:
    """Returns about the bytes of a parameter of the checkpoint, and of those like it.

    Args:
      path: the path in the model that is cut out.
      leaf: the parameter, as it is stored.
    """
    likes = self.counts.get(path.partition('/')[0], 1.0)
    whole, part = math.prod(self.shapes[path]), math.prod(leaf.shape)
    if not structured.is_structured(leaf):
      return likes * whole / part * weights.estimate([np.asarray(leaf)])
    stored = {name: np.asarray(x) for name, x in leaf.stored()[1].items()}
    fixed = [x for name, x in stored.items() if leaf.needs and x.ndim == 2]
    fixed += [x for name, x in stored.items() if name == 'shifts']
    others = [x for x in stored.values() if not any(x is y for y in fixed)]
    growth, hidden = whole / part, self.config.hidden_size
    narrower = _narrow(hidden, hidden) / hidden
    if 'shortcut' in path and narrower < 1:
      (rows, columns), count = self.shapes[path], sum(x.size for x in stored.values())
      # A cut shortcut without numbers, [I 0], tells that the whole has none, either.
      rank = min(hidden - rows, rows) if rows == columns and count else 0
      numbers = rows * rank - rank * (rank - 1) / 2
      return likes * numbers * weights.estimate([*stored.values()]) / max(count, 1)
    if leaf.type_name == 'trapezoidal_rows':  # its triangle does not grow
      kept = sum(x.size for x in others)
      growth = (whole - (part - kept) / narrower**2) / kept
    return likes * (weights.estimate(fixed) + growth * weights.estimate(others))


def _layers(config: models.ModelConfig) -> tuple[list[int], list[float]]:
  """Chooses layers, and says how many layers each of them stands for."""
  count = config.num_layers
  if count <= _LAYERS:
    return list(range(count)), [1.0] * count
  between = spread(range(1, count - 1), _LAYERS - 2)
  likes = [(count - 2) / len(between)] * len(between)
  return [0, *between, count - 1], [1.0, *likes, 1.0]


def _widths(config: models.ModelConfig, layers: list[int]) -> dict[int, list[int]]:
  """Returns the widths of the segments that layers have in the model that is cut out.

  Where a layer does not fit the one before it, the wider one of the two is cut.
  """
  hidden = config.hidden_size
  found = {i: [_narrow(x, hidden) for x in config.layer_widths(i)] for i in layers}
  for before, after in itertools.pairwise(found.values()):
    before[-1] = after[0] = min(before[-1], after[0])
  return found


def _chosen(config: models.ModelConfig) -> dict[str, np.ndarray]:
  """Chooses the places of each axis that is cut."""
  narrow = _narrow(config.hidden_size, config.hidden_size)
  most = max(_PART // narrow, 64)
  spread = lambda length, count: np.arange(count) * length // max(count, 1)
  group, h = config.num_heads // config.num_kv_heads, config.head_dim
  count = min(config.num_kv_heads, max(most // (group * h), 1))
  heads = spread(config.num_kv_heads, count)
  columns = lambda x: (x[:, None] * h + np.arange(h)).reshape(-1)
  queries = columns((heads[:, None] * group + np.arange(group)).reshape(-1))
  # Fewer tokens than coordinates would always be a linear image of the head. If it is
  # cut, it is another head in any case.
  tokens = max(_TOKENS, 4 * narrow if config.sliced else 0)
  if narrow < config.hidden_size:
    tokens = _CUT
  neurons, positions = config.intermediate_size, config.learned_positions
  return {
    'query': queries,
    'key': columns(heads),
    # As many as columns of queries, so that kernels have few shapes.
    'neuron': spread(neurons, min(neurons, max(len(queries), 64))),
    'vocabulary': spread(config.vocab_size, min(config.vocab_size, tokens)),
    'position': spread(positions, min(positions, _TOKENS)),
  }


def _config(
  config: models.ModelConfig,
  widths: Mapping[int, Sequence[int]],
  lengths: Mapping[str, int],
) -> models.ModelConfig:
  """Returns the config of the model that is cut out.

  Args:
    config: that of the checkpoint.
    widths: see `_widths`.
    lengths: how long the axes are that are cut.
  """
  hidden = config.hidden_size
  first, *others = widths.values()
  return dataclasses.replace(
    config,
    hidden_size=_narrow(hidden, hidden),
    num_layers=len(widths),
    num_heads=lengths['query'] // config.head_dim,
    num_kv_heads=lengths['key'] // config.head_dim,
    intermediate_size=lengths['neuron'],
    vocab_size=lengths['vocabulary'],
    learned_positions=lengths['position'],
    segment_widths=(*first, *(x for own in others for x in own[1:])),
  )


def _narrow(width: int, hidden: int) -> int:
  """Returns the width of a residual segment in the model that is cut out."""
  return width if hidden <= _WIDE else max(width * _CUT // hidden, 1)


def _cut(
  tree: models.Params,
  axes: models.layout.Axes,
  chosen: Mapping[str, np.ndarray],
  widths: Sequence[int],
) -> models.Params:
  """Cuts the axes of parameters.

  Args:
    tree: the parameters.
    axes: their axes by path.
    chosen: the places of each axis but the residual segments.
    widths: the widths of those, by the numbers that axes have.
  """
  found = {}
  for path, leaf in structured.flatten(tree).items():
    array = np.asarray(structured.materialize(leaf))
    for k, axis in enumerate(axes[path]):
      places = np.arange(array.shape[k])
      if isinstance(axis, str) and axis in chosen:
        places = chosen[axis]
      elif axis != 'head':
        count = widths[axis] if isinstance(axis, int) else widths[0]  # of a norm
        places = np.arange(count) * array.shape[k] // count
      if len(places) < array.shape[k]:
        if array.flags.f_contiguous:  # a transposed kernel: its columns are in order
          array = np.take(array.T, places, array.ndim - 1 - k).T
        else:
          array = np.take(array, places, k)
    found[path] = array
  return structured.unflatten(found)


def flat(batches: Iterable[tuple[list[passes.Record], Any]]) -> dict[str, Any]:
  """Returns the leaves of all records by path."""
  flat: dict[str, Any] = {}
  for records, _ in batches:
    for record in records:
      flat |= structured.flatten(record.params)
  return flat
