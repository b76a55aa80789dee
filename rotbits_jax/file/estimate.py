"""Sizes of files before they are written, and the step with which a file has a size.

`estimate` multiplies counts by measured bits: the coder plans some rows of a few
tensors, rounded as the preset rounds them, and the config tells how many elements the
preset stores. `write_within` writes files of `near` at a few steps and interpolates,
because a file's bytes are nearly linear in the step.
"""

import collections
from collections.abc import Callable
import itertools
import math
from typing import Any
import zlib

import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.file import encode
from rotbits_jax.passes import tied
from rotbits_jax.relative import entries
from rotbits_jax.system import progress as progress_lib

_WITHIN = 0.01  # the most that a file of a target size has fewer bytes, relative
_RECORDS = 3  # of one kind that are read
_ELEMENTS = 1 << 18  # of a sample
_ENTRY = 30  # bytes of a tensor's entry in the manifest, about
_START = -5.0
_BITS = 7.05  # of a normal number at this step, of which each octave takes one
_PROBES = 6  # files that are written in the search of a step


def estimate(source: Any, *, progress: bool = False) -> dict[str, int]:
  """Estimates the bytes of the file that each preset would write, by its name.

  There is none of `paper`, nor of `free` for a checkpoint of no known family. `source`
  is a checkpoint that `checkpoints.open_any` opened.
  """
  config = source.config
  roundings = {'exact': None, 'near': presets.near().rounding}
  if config is not None:
    roundings['free'] = presets.free().rounding
  sizes = dict.fromkeys(sorted(roundings), 0.0)
  alike = collections.defaultdict(list)
  for record in source.records:
    specs = structured.flatten(source.specs(record)).values()
    alike[tuple((x.shape, x.dtype) for x in specs)].append(record)
  with progress_lib.Progress('estimate', len(alike), 'group', show=progress) as bar:
    for records in alike.values():
      sampled = records[:: -(-len(records) // _RECORDS)]
      for record in sampled:
        for path, array in structured.flatten(source.read(record)).items():
          for preset, rounding in roundings.items():
            nbytes = _array_bytes(path, array, rounding)
            sizes[preset] += nbytes * len(records) / len(sampled)
      bar.update()
  kept = 1.0 if config is None else 1 - _removed(source) / models.count_elements(config)
  others = _ENTRY * len(source.tensors)
  others += sum(len(zlib.compress(x)) for x in source.files.values())
  return {
    preset: round(others + (size if preset == 'exact' else size * kept))
    for preset, size in sizes.items()
  }


def _array_bytes(path: str, array: np.ndarray, rounding: Any) -> float:
  """Returns about the bytes of an array, from some rows of it, rounded."""
  rows = array.reshape(-1, (array.shape[-1] if array.ndim > 1 else 1) or 1)
  sample = np.ascontiguousarray(rows[:: max(array.size // _ELEMENTS, 1)])
  leaf: Any = sample if rounding is None else encode.rounded(rounding, path, sample)
  if structured.is_structured(leaf):
    stored = list(leaf.stored()[1].values())
  else:
    stored = [leaf.view(entries.stored_dtype(array.dtype.name))]
  return coder.estimate(stored) * len(rows) / max(len(sample), 1)


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


def write_within(target: int, write: Callable[[float, range], int]) -> None:
  """Writes the largest file of `near` that is found within a size in bytes.

  It has at least 99% of the size, where steps between exist. `write` takes a step and
  the sizes to accept; it lets a file of such a size appear, and returns its size.
  """
  accepted = range(math.ceil((1 - _WITHIN) * target), target + 1)
  aim, sizes, step = (1 - _WITHIN / 2) * target, dict[float, int](), _START
  while step not in sizes and len(sizes) < _PROBES:
    size = sizes[step] = write(step, accepted)
    if size in accepted:
      return
    step += _BITS * (size - aim) / size
    if min(sizes.values()) < aim < max(sizes.values()):
      ascending = sorted(sizes, key=sizes.__getitem__)
      step = float(np.interp(aim, [sizes[x] for x in ascending], ascending))
    step = min(max(round(step, 3), passes.FINEST), passes.COARSEST)
  fitting = [step for step, size in sizes.items() if size <= target]
  least, most = min(sizes.values()), max(sizes.values())
  if not fitting or (most < target and min(sizes) <= passes.FINEST):
    raise ValueError(
      f'near has steps from 2^{passes.FINEST:g} to 2^{passes.COARSEST:g}, and wrote '
      f'files of {least:,} to {most:,} bytes, none of about {target:,}'
    )
  write(min(fitting), range(target + 1))
