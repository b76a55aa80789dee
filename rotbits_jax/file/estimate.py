"""Sizes of files before they are written, and the step with which a file has a size.

`estimate` multiplies counts by measured bits: the coder plans some rows of a few
tensors, rounded as the preset rounds them, and the config tells how many elements the
preset stores. `write_within` writes files of `near` at two steps and interpolates,
because a file's bytes are nearly linear in the step.
"""

from collections.abc import Callable, Mapping
import itertools
import math
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.passes import rounding as rounding_lib
from rotbits_jax.passes import tied
from rotbits_jax.relative import entries
from rotbits_jax.relative import measure
from rotbits_jax.relative import recipe
from rotbits_jax.system import progress as progress_lib

WITHIN = 0.01
"""A file of a target size has at least this part fewer bytes than the target."""

_RECORDS = 3  # of one kind that are read
_ELEMENTS = 1 << 18  # of a sample
_ENTRY = 30  # bytes of a tensor's entry in the manifest, about
_CODED = 1.5e8  # bytes that two cores code in a second
_REWRITTEN = 4e10  # elements times width that they rewrite in a second
_LEAST_MEMORY = 1 << 28
_MOST_RECORDS = {True: 8, False: 16}  # in memory, as bytes: exact, or rewritten
_START = -5.0
_PROBES = 6  # files that are written in the search of a step


class Estimate(NamedTuple):
  """About the bytes of a preset's file, and two cores' seconds and memory for it."""

  preset: str
  nbytes: int
  seconds: float
  memory: int


def estimate(
  source: Any, *, base: Any = None, progress: bool = False
) -> tuple[list[Estimate], str | None]:
  """Estimates the size of the file that each preset but `paper` would write.

  With a base there is one more estimate, of `exact` beside it; but not for a sliced
  model beside its dense one, where only the work itself tells.

  Args:
    source: a checkpoint, as `checkpoints.open_any` opens it.
    base: see `api.encode`.
    progress: whether to show the progress on stderr.

  Returns:
    The estimates; and why there is none of `free`, or None.
  """
  config, opened = source.config, None
  if base is not None:
    opened = reader_lib.open_base(base, plain=config is None)
    opened.check_shares([path for flat in _specs(source).values() for path in flat])
    if recipe.suits(source, opened):
      opened = None
  roundings = {'exact': None, 'near': presets.near().rounding}
  if config is not None:
    roundings['free'] = presets.free().rounding
  totals = dict.fromkeys([*roundings, *(['exact --base'] if opened else [])], 0.0)
  groups = _groups(source)
  with progress_lib.Progress('estimate', len(groups), 'group', show=progress) as bar:
    for records, likes in groups:
      leaves = [structured.flatten(source.read(record)).items() for record in records]
      for path, leaf in itertools.chain(*leaves):
        for preset, rounding in roundings.items():
          totals[preset] += likes * _leaf_bytes(path, leaf, rounding, config is None)
        if opened is not None:
          totals['exact --base'] += likes * _bytes_beside(leaf, opened.array(path))
      bar.update()
  kept = 1.0 if config is None else 1 - _removed(source) / models.count_elements(config)
  estimates = [
    _with_needs(source, preset, size * (1.0 if 'exact' in preset else kept))
    for preset, size in sorted(totals.items())
  ]
  why = None if config is not None else source.reason or 'it is of no known family'
  return estimates, why


def counts(source: Any) -> tuple[int, int]:
  """Returns how many elements the tensors have, and how many bytes."""
  leaves = [leaf for flat in _specs(source).values() for leaf in flat.values()]
  elements = sum(map(structured.count_elements, leaves))
  return elements, sum(map(structured.count_bytes, leaves))


def _specs(source: Any) -> dict[str, dict[str, Any]]:
  """Returns the shapes of parameters by record and path; nothing is read."""
  return {name: structured.flatten(source.specs(name)) for name in source.records}


def _groups(source: Any) -> list[tuple[list[str], float]]:
  """Returns some records of each shape, and how many each of them stands for."""
  groups: dict[tuple[Any, ...], list[str]] = {}
  for record, specs in _specs(source).items():
    key = tuple((tuple(x.shape), np.dtype(x.dtype).name) for x in specs.values())
    groups.setdefault(key, []).append(record)
  samples = []
  for records in groups.values():
    count = min(len(records), _RECORDS)
    places = [int((k + 0.5) * len(records) / count) for k in range(count)]
    samples.append(([records[place] for place in places], len(records) / count))
  return samples


def _leaf_bytes(path: str, leaf: Any, rounding: Any, is_plain: bool) -> float:
  """Returns about the bytes of a leaf, from some rows of it, rounded."""
  if structured.is_structured(leaf):
    return coded_bytes(leaf)
  (rows,), times = _sampled(leaf)
  is_float = jnp.issubdtype(rows.dtype, jnp.floating)
  if rounding is not None and is_float and rounding_lib.is_matrix(rows):
    step = rounding.log2_step(path, rows.dtype)
    uniform = rounding.uniform and not is_plain
    wide = jnp.asarray(rows, jnp.float32)
    rounded, _ = rounding_lib.round_leaf(wide, rows.dtype, step, uniform)
    rows = rounding_lib.narrowed(jax.device_get(rounded))
  return times * coded_bytes(rows)


def coded_bytes(leaf: Any) -> float:
  """Returns about the bytes of an array or a structured leaf."""
  if structured.is_structured(leaf):
    return coder.estimate([np.asarray(x) for x in leaf.stored()[1].values()])
  array = np.asarray(leaf)
  return coder.estimate([array.view(entries.stored_dtype(array.dtype.name))])


def _bytes_beside(leaf: Any, known: np.ndarray | None) -> float:
  """Returns about the bytes of a leaf beside an array of a base."""
  if structured.is_structured(leaf) or known is None or known.shape != leaf.shape:
    return _leaf_bytes('', leaf, None, is_plain=True)
  (rows, base_rows), times = _sampled(leaf, known)
  beside = measure.beside(rows, base_rows)
  alone = coded_bytes(rows)
  return times * (alone if beside is None else min(alone, beside.estimate()))


def _sampled(*arrays: Any) -> tuple[list[np.ndarray], float]:
  """Returns some rows of arrays of one shape, and all rows as a multiple of them."""
  columns = (arrays[0].shape[-1] if arrays[0].ndim > 1 else 1) or 1
  matrices = [np.asarray(x).reshape(-1, columns) for x in arrays]
  count = len(matrices[0])
  sampled = min(count, max(_ELEMENTS // columns, 64))
  places = np.arange(sampled) * count // max(sampled, 1)
  return [np.ascontiguousarray(x[places]) for x in matrices], count / max(sampled, 1)


def _removed(source: Any) -> float:
  """Returns how many elements of a model `free` and `near` do not store."""
  config = source.config
  valid, rotated = models.layout.symmetries(config), config.rotary_dim
  queries = rotated + (config.head_dim - rotated) ** 2
  per_head = valid.values * config.head_dim**2 + valid.queries * queries
  removed = config.num_layers * config.num_kv_heads * per_head
  if valid.segments:
    hidden, width = config.hidden_size, config.segment_widths[0]
    for before, after in itertools.pairwise(config.segment_widths):
      rank = min(hidden - after, after) if before == after else 0
      removed += before * after - (after * rank - rank * (rank - 1) // 2)
    removed += width * (width - 1) // 2
    outer = structured.flatten(source.read('embed') | source.read('head'))
    table, head = (np.asarray(outer[k]) for k in ('embed/tokens', 'head/kernel'))
    if tied.is_tied(table, head):
      removed += (config.vocab_size - hidden) * width
  return removed


def _with_needs(source: Any, preset: str, size: float) -> Estimate:
  """Adds the other files, and about the seconds and the memory that it takes."""
  specs, (elements, nbytes) = _specs(source), counts(source)
  size += sum(len(zlib.compress(x)) for x in source.files.values())
  size += _ENTRY * sum(map(len, specs.values()))
  is_exact = 'exact' in preset
  seconds = nbytes / _CODED
  if not is_exact and source.config is not None:
    seconds += elements * source.config.hidden_size / _REWRITTEN
  of_records = (sum(map(structured.count_bytes, x.values())) for x in specs.values())
  memory = _LEAST_MEMORY + _MOST_RECORDS[is_exact] * max(of_records, default=0)
  return Estimate(preset, round(size), seconds, memory)


def write_within(target: int, count: int, write: Callable[[float, range], int]) -> None:
  """Writes the largest file of `near` that is found within a size.

  Args:
    target: the greatest number of bytes of the file. It has at least 99% of them, where
      steps between exist.
    count: how many elements the input has.
    write: takes a step and the sizes to accept. Writes the file, lets it appear if it
      has such a size, and returns its size.
  """
  accepted = range(math.ceil((1 - WITHIN) * target), target + 1)
  sizes: dict[float, int] = {}
  step: float | None = _START
  while step is not None and len(sizes) < _PROBES:
    sizes[step] = write(step, accepted)
    if sizes[step] in accepted:
      return
    step = _next_step(sizes, (1 - WITHIN / 2) * target, count)
  fitting = [step for step, size in sizes.items() if size <= target]
  finest, coarsest = rounding_lib.FINEST, rounding_lib.COARSEST
  least, most = min(sizes.values()), max(sizes.values())
  if not fitting or (most < target and min(sizes) <= finest):
    raise ValueError(
      f'near has steps from 2^{finest:g} to 2^{coarsest:g}, with which files of '
      f'{least:,} to {most:,} bytes were found, and none of about {target:,} bytes'
    )
  write(min(fitting), range(target + 1))


def _next_step(sizes: Mapping[float, int], aim: float, count: int) -> float | None:
  """Returns the step to try next; None if there is none between those tried.

  The first guess is that an octave of the step takes a bit of each element.
  """
  small = [step for step, size in sizes.items() if size <= aim]
  large = [step for step, size in sizes.items() if size > aim]
  if small and large:
    above, below = max(large), min(small)
    share = (sizes[above] - aim) / (sizes[above] - sizes[below])
    step = above + min(max(share, 0.05), 0.95) * (below - above)
  else:
    nearest = max(large) if large else min(small)
    step = nearest + 8 * (sizes[nearest] - aim) / max(count, 1)
  step = min(max(round(step, 3), rounding_lib.FINEST), rounding_lib.COARSEST)
  return None if step in sizes else step
