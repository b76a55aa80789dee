"""Estimates of the bytes that presets take, from samples of a checkpoint.

The coder's own plans give the bytes of a sample, `coding.weights.estimate`; nothing is
coded. For the preset `exact` a sample is some rows of each tensor of a few layers. Two
samples of different sizes tell what more rows cost, and what an array costs however
many rows it has, such as its frequency tables.

`free` and `near` change coordinates. So they rewrite a small model that is cut out of
the checkpoint: a few layers, and in each of them a few heads, neurons and tokens. The
bytes of each of its tensors then stand for those of the whole. A residual stream of
more than 768 coordinates is cut, too, because decompositions would take too long. Then
a shortcut counts as one of full rank, and the embedding as one that is not tied.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
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
from rotbits_jax.file import base as base_lib
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import sources
from rotbits_jax.passes import relative
from rotbits_jax.presets import steps
from rotbits_jax.system import progress as progress_lib

Opened = checkpoints.CheckpointReader | checkpoints.TensorFiles

_RECORDS = 3  # of one kind that are read
_ELEMENTS = 1 << 19  # of a sample
_LAYERS = 4  # of the model that is cut out
_PART = 1 << 22  # the greatest number of elements of one of its layers, about
_TOKENS = 4096  # of its vocabulary
_WIDE = 768  # the greatest width of its residual stream
_ENTRY = 250  # bytes of a tensor's entry in the manifest, about
_NOTE = 200  # bytes of the notes of a tensor that is rewritten


class Estimate(NamedTuple):
  """What a preset would take of a checkpoint.

  Attributes:
    preset: name of the preset.
    nbytes: the estimated size of the file.
  """

  preset: str
  nbytes: int


def estimate(
  opened: Opened, *, base: Any = None, progress: bool = False
) -> tuple[list[Estimate], str | None]:
  """Estimates the size of the file that each preset would write.

  Args:
    opened: the checkpoint, as `checkpoints.open_any` opens it.
    base: see `api.encode`; with it there is one more estimate, of `exact` beside it.
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
  if isinstance(opened, checkpoints.TensorFiles):
    why = opened.reason or 'it is of no known family'
  elif any(map(structured.is_structured, _specs(opened).values())):
    why = 'the weights are quantised, or products of factors'
  groups = _groups(opened)
  count = sum(len(own.chosen) for own in groups) + 2
  with progress_lib.Progress('estimate', count, 'part', show=progress) as bar:
    bar.stage('exact')
    alone = beside = float(overhead(opened))
    for own in groups:
      for record in own.chosen:
        sizes = _of_record(opened, record, found)
        alone += sizes[0] * own.size / len(own.chosen)
        beside += sizes[1] * own.size / len(own.chosen)
        bar.update()
    results = [Estimate('exact', round(alone))]
    if found is not None:
      results.append(Estimate('exact --base', round(beside)))
    if why is None and isinstance(opened, checkpoints.CheckpointReader):
      bar.stage('free, near')
      cut = _CutOut.make(opened)
      results[0] = Estimate('exact', round(alone - cut.predictable()))
      bar.update()
      others = [presets.free(), presets.near()]
      for preset, size in zip(others, cut.sizes(others), strict=True):
        size += overhead(opened, is_rewritten=True)
        results.append(Estimate(preset.name, round(size)))
      bar.update()
  return results, why


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


def overhead(opened: Opened | sources.Source, *, is_rewritten: bool = False) -> int:
  """Returns about how many bytes a file has besides its tensors.

  Args:
    opened: the checkpoint.
    is_rewritten: whether the manifest has notes on how tensors were rewritten.
  """
  files = sum(len(zlib.compress(x)) for x in opened.files.values())
  return files + (_ENTRY + _NOTE * is_rewritten) * len(_specs(opened))


# ---- exact ---------------------------------------------------------------------------


class _Group(NamedTuple):
  """Records with parameters of the same shapes: how many, and those that are read."""

  size: int
  chosen: list[str]


def _groups(opened: Opened) -> list[_Group]:
  groups: dict[tuple[Any, ...], list[str]] = {}
  for record in opened.records:
    specs = structured.flatten(opened.specs(record))
    key = tuple(
      (path.removeprefix(record), tuple(x.shape), np.dtype(x.dtype).name)
      for path, x in specs.items()
    )
    groups.setdefault(key, []).append(record)
  return [_Group(len(own), spread(own, _RECORDS)) for own in groups.values()]


def spread(items: Sequence[Any], most: int) -> list[Any]:
  """Returns at most so many items, at equal distances."""
  count = min(len(items), most)
  return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


def _of_record(
  opened: Opened, record: str, base: base_lib.Base | None
) -> tuple[float, float]:
  """Returns about the bytes of a record: alone, and beside the base."""
  alone = beside = 0.0
  for path, leaf in structured.flatten(opened.read(record)).items():
    own = of_leaf(leaf)
    alone += own
    if not structured.is_structured(leaf):
      known = None if base is None else base.array(path)
      if known is not None and known.shape == leaf.shape:
        own = min(own, _extrapolated(np.asarray(leaf), _beside, known))
    beside += own
  return alone, beside


def of_leaf(leaf: Any) -> float:
  """Returns about the bytes of an array or a structured leaf."""
  if structured.is_structured(leaf):
    return weights.estimate(list(leaf.stored()[1].values()))
  return _extrapolated(np.asarray(leaf), lambda x: weights.estimate([x]))


def _extrapolated(
  array: np.ndarray, size_of: Callable[..., float], *others: np.ndarray
) -> float:
  """Returns about the bytes of an array, from those of two samples of its rows.

  Args:
    array: the array.
    size_of: takes the same rows of the array and of the others, and returns bytes.
    others: arrays of the same shape.
  """
  columns = array.shape[-1] if array.ndim > 1 else 1
  whole = [x.reshape(-1, columns) for x in (array, *others)]
  count = len(whole[0])
  many = max(_ELEMENTS // max(columns, 1), 64)
  if many >= count:
    return float(size_of(*map(np.ascontiguousarray, whole)))
  sizes = []
  for rows in (many // 2, many):
    places = np.arange(rows) * count // rows
    sizes.append(size_of(*(np.ascontiguousarray(x[places]) for x in whole)))
  slope = (sizes[1] - sizes[0]) / (many - many // 2)
  return float(sizes[1] + slope * (count - many))


def _beside(array: np.ndarray, known: np.ndarray) -> float:
  leaf = relative.beside(array, known)
  arrays = [array] if leaf is None else list(leaf.stored()[1].values())
  return weights.estimate(arrays)


# ---- free and near -------------------------------------------------------------------


class _CutOut(NamedTuple):
  """A small model that is cut out of a checkpoint.

  Attributes:
    opened: the checkpoint.
    model: the model.
    counts: how many layers of the checkpoint each of its layers stands for.
    shapes: the shapes in the checkpoint, by the path in the model.
  """

  opened: checkpoints.CheckpointReader
  model: models.Model
  counts: list[float]
  shapes: dict[str, tuple[int, ...]]

  @classmethod
  def make(cls, opened: checkpoints.CheckpointReader) -> '_CutOut':
    config = opened.config
    indices, counts = _layers(config)
    chosen = _chosen(config)
    part = _config(config, indices, {x: len(y) for x, y in chosen.items()})
    axes, shapes = models.layout.layer_axes(config), {}
    layers = []
    for k, i in enumerate(indices):
      layer, prefix = opened.layer(i), models.names.prefix(k)
      for path, leaf in structured.flatten(layer).items():
        shapes[prefix + path] = tuple(leaf.shape)
      layers.append(_cut(layer, axes, chosen, config.hidden_size))
    given, axes = opened.outer(), models.layout.outer_axes(config)
    shapes |= {x: tuple(y.shape) for x, y in structured.flatten(given).items()}
    outer = _cut(given, axes, chosen, config.hidden_size)
    return cls(opened, models.from_layers(part, outer, layers, {}), counts, shapes)

  def predictable(self) -> float:
    """Returns the bytes that `exact` saves of an embedding beside its head."""
    none = range(self.model.config.num_layers, self.model.config.num_layers)
    before, saved = dict(self.model.leaves()), 0.0
    context, chain = passes.make_context(self.model), presets.exact().transform
    records = passes.rewrite(context, chain, rounding=None, layers=none)
    for path, leaf in flat(records).items():
      if structured.is_structured(leaf):
        saved += self._size(path, before[path]) - self._size(path, leaf)
    return saved

  def sizes(self, all_presets: Sequence[presets.Preset]) -> list[float]:
    """Returns the bytes that presets take, which rewrite with the same transforms."""
    context = passes.make_context(self.model)
    unrounded = context._replace(source=steps.rewritten(self.model))
    return [
      sum(
        self._size(path, leaf)
        for path, leaf in flat(
          passes.rewrite(unrounded, passes.chain(), rounding=preset.rounding)
        ).items()
      )
      for preset in all_presets
    ]

  def _size(self, path: str, leaf: Any) -> float:
    """Returns about the bytes of a parameter of the checkpoint, and of those like it.

    Args:
      path: the path in the model that is cut out.
      leaf: the parameter, as it is stored.
    """
    index = models.names.layer_index(path)
    likes = 1.0 if index is None else self.counts[index]
    whole, part = math.prod(self.shapes[path]), math.prod(leaf.shape)
    if not structured.is_structured(leaf):
      return likes * whole / part * weights.estimate([np.asarray(leaf)])
    stored = {name: np.asarray(x) for name, x in leaf.stored()[1].items()}
    fixed = [x for name, x in stored.items() if leaf.needs and x.ndim == 2]
    fixed += [x for name, x in stored.items() if name == 'shifts']
    others = [x for x in stored.values() if not any(x is y for y in fixed)]
    growth, hidden = whole / part, self.opened.config.hidden_size
    narrower = _narrow(hidden, hidden) / hidden
    if 'shortcut' in path and narrower < 1:
      bits = weights.estimate(list(stored.values())) / sum(
        x.size for x in stored.values()
      )
      rows, columns = self.shapes[path]
      rank = min(hidden - rows, rows) if rows == columns else 0
      return likes * bits * (rows * rank - rank * (rank - 1) / 2)
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
  found = [0, *between, count - 1]
  widths = [config.layer_widths(i) for i in found]
  if all(a[-1] == b[0] for a, b in itertools.pairwise(widths)):
    return found, [1.0, *[(count - 2) / len(between)] * len(between), 1.0]
  return list(range(_LAYERS)), [count / _LAYERS] * _LAYERS


def _chosen(config: models.ModelConfig) -> dict[str, np.ndarray]:
  """Chooses the places of each axis that is cut."""
  elements = models.count_elements(config) / max(config.num_layers, 1)
  elements *= _narrow(config.hidden_size, config.hidden_size) / config.hidden_size
  share = min(_PART / elements, 1.0)
  most = lambda length, least: min(length, max(int(share * length), least))
  spread = lambda length, count: np.arange(count) * length // max(count, 1)
  heads = spread(config.num_kv_heads, most(config.num_kv_heads, 1))
  group, h = config.num_heads // config.num_kv_heads, config.head_dim
  queries = (heads[:, None] * group + np.arange(group)).reshape(-1)
  columns = lambda x: (x[:, None] * h + np.arange(h)).reshape(-1)
  # Fewer tokens than coordinates would always be a linear image of the head.
  narrow = _narrow(config.hidden_size, config.hidden_size)
  tokens = max(_TOKENS, 4 * narrow if config.sliced else 0)
  neurons, positions = config.intermediate_size, config.learned_positions
  return {
    'query': columns(queries),
    'key': columns(heads),
    'neuron': spread(neurons, most(neurons, 64)),
    'vocabulary': spread(config.vocab_size, min(config.vocab_size, tokens)),
    'position': spread(positions, min(positions, _TOKENS)),
  }


def _config(
  config: models.ModelConfig, layers: list[int], lengths: dict[str, int]
) -> models.ModelConfig:
  """Returns the config of the model that is cut out."""
  widths = list(config.layer_widths(layers[0])[:1])
  for i in layers:
    widths += config.layer_widths(i)[1:]
  hidden = config.hidden_size
  return dataclasses.replace(
    config,
    hidden_size=_narrow(hidden, hidden),
    num_layers=len(layers),
    num_heads=lengths['query'] // config.head_dim,
    num_kv_heads=lengths['key'] // config.head_dim,
    intermediate_size=lengths['neuron'],
    vocab_size=lengths['vocabulary'],
    learned_positions=lengths['position'],
    segment_widths=tuple(_narrow(width, hidden) for width in widths),
  )


def _narrow(width: int, hidden: int) -> int:
  """Returns the width of a residual segment in the model that is cut out."""
  return width if hidden <= _WIDE else max(width * _WIDE // hidden, 1)


def _cut(
  tree: models.Params,
  axes: models.layout.Axes,
  chosen: dict[str, np.ndarray],
  hidden: int,
) -> models.Params:
  """Cuts the axes of parameters."""
  found = {}
  for path, leaf in structured.flatten(tree).items():
    array = np.asarray(leaf)
    for k, axis in enumerate(axes[path]):
      if isinstance(axis, str) and axis in chosen:
        places = chosen[axis]
      else:
        count = _narrow(array.shape[k], hidden)
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
