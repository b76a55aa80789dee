"""Sizes of files before they are written, and the step with which a file has a size.

`estimate` multiplies counts by measured bits: the coder plans some rows of a few
tensors, rounded as the preset rounds them. Some layers are rewritten for `free`, and
for `exact` of sliced models. `write_within` writes files of `near` at a few steps and
interpolates, because a file's bytes are nearly linear in the step.
"""

import collections
from collections.abc import Callable
import itertools
import math
from typing import Any
import zlib

import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import quantisers
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.file import encode
from rotbits_jax.relative import measure
from rotbits_jax.structured import difference
from rotbits_jax.system import progress as progress_lib

_WITHIN = 0.01  # the most that a file of a target size has fewer bytes, relative
_RECORDS = 3  # of one kind that are read
_ELEMENTS = 1 << 18  # of a sample
_FILE, _ENTRY = 2000, 14  # bytes of a manifest, and of a tensor's entry in it, about
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
  sizes = dict.fromkeys(roundings, 0.0)
  alike = collections.defaultdict(list)
  for record in source.records:
    specs = structured.flatten(source.specs(record)).values()
    alike[tuple((x.shape, x.dtype) for x in specs)].append(record)
  count = len(alike) + (config is not None)
  with progress_lib.Progress('estimate', count, 'step', show=progress) as bar:
    for records in alike.values():
      sampled = records[:: -(-len(records) // _RECORDS)]
      for record in sampled:
        for path, array in structured.flatten(source.read(record)).items():
          for preset, rounding in roundings.items():
            nbytes = _array_bytes(path, array, rounding)
            sizes[preset] += nbytes * len(records) / len(sampled)
      bar.update()
    if config is not None:
      sizes['free'], kept = _rewritten(source, presets.free())
      sizes['near'] *= kept
      if config.sliced:  # an embedding in terms of its head
        sizes['exact'], _ = _rewritten(source, presets.exact())
      bar.update()
  others = _FILE + _ENTRY * len(source.tensors)
  others += sum(len(zlib.compress(x)) for x in source.files.values())
  return {preset: round(others + sizes[preset]) for preset in sorted(sizes)}


def _rewritten(source: Any, preset: presets.Preset) -> tuple[float, float]:
  """Returns about the bytes of a preset, and the share of elements that it stores."""
  config, widths = source.config, source.config.segment_widths
  count, step = config.num_layers, config.segments_per_layer
  is_even = count > _RECORDS and widths[_RECORDS * step] == widths[-1]
  chosen = _RECORDS if is_even else count
  small = msgspec.structs.replace(
    config, num_layers=chosen, segment_widths=widths[: chosen * step + 1]
  )
  model = source.load(range(chosen)).model.replace(config=small)
  context, nbytes, elements = passes.make_context(model), 0.0, 0
  given = structured.flatten(model.params)
  rewritten = passes.rewrite(context, preset.transform, rounding=preset.rounding)
  for record in itertools.chain.from_iterable(records for records, _ in rewritten):
    # The second layer stands for those that are not read.
    weight = 1 + (count - chosen) * (record.name == models.names.layer(1))
    leaves = structured.flatten(record.params)
    elements += weight * sum(map(structured.count_elements, leaves.values()))
    arrays = list[np.ndarray]()
    for leaf in leaves.values():
      if isinstance(leaf, difference.Difference):  # an embedding beside its head
        nbytes += measure.of_leaf(leaf, *map(given.__getitem__, leaf.needs)).estimate()
      else:
        arrays += encode.stored(leaf)[1].values()
    nbytes += weight * coder.estimate(arrays)
  return nbytes, elements / models.count_elements(config)


def _array_bytes(path: str, array: np.ndarray, rounding: Any) -> float:
  """Returns about the bytes of an array, from some rows of it, rounded."""
  if rounding is None and (codes := quantisers.find(array)) is not None:
    return quantisers.nbytes(codes)
  rows = array.reshape(-1, (array.shape[-1] if array.ndim > 1 else 1) or 1)
  sample = np.ascontiguousarray(rows[:: max(array.size // _ELEMENTS, 1)])
  leaf: Any = sample if rounding is None else encode.rounded(rounding, path, sample)
  nbytes = coder.estimate([*encode.stored(leaf)[1].values()])
  return nbytes * len(rows) / max(len(sample), 1)


def write_within(target: int, write: Callable[[float, range], int]) -> None:
  """Writes the largest file of `near` that is found within a size in bytes.

  `write` takes a step and the sizes to accept; it lets a file of such a size appear,
  and returns its size.
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
    text = f'files of {least:,} to {most:,} bytes, none of about {target:,}'
    raise ValueError(f'near has steps from 2^{passes.FINEST:g} on, and wrote {text}')
  write(min(fitting), range(target + 1))
