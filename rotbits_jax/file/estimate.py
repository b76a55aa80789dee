"""Sizes of files before they are written, and the step with which a file has a size.

`estimate` multiplies counts by measured bits: the coder plans some rows of a few
tensors, rounded as the preset rounds them. Some layers are rewritten for `free`, and
for `exact` of sliced models. `write_within` writes files of `near` at a few steps and
interpolates, because a file's bytes are nearly linear in the step.
"""

import collections
from collections.abc import Callable
import math
from typing import Any
import zlib

import numpy as np

from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import prices
from rotbits_jax.system import progress as progress_lib

_WITHIN = 0.01  # the most that a file of a target size has fewer bytes, relative
_FILE, _ENTRY = 2000, 14  # bytes of a manifest, and of a tensor's entry in it, about
_START = -5.0
_BITS = 7.05  # of a normal number at this step, of which each octave takes one
_SAME = 64  # bytes by which files of the same arrays differ at most
_PROBES = 8  # files that are written in the search of a step


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
      sampled = records[:: -(-len(records) // prices.RECORDS)]
      for record in sampled:
        for path, array in structured.flatten(source.read(record)).items():
          for preset, rounding in roundings.items():
            nbytes = prices.array_bytes(path, array, rounding)
            sizes[preset] += nbytes * len(records) / len(sampled)
      bar.update()
    if config is not None:
      sizes['free'], kept = prices.rewritten_bytes(source, presets.free())
      sizes['near'] *= kept
      if config.sliced:  # an embedding in terms of its head
        sizes['exact'], _ = prices.rewritten_bytes(source, presets.exact())
      bar.update()
  sizes = {preset: min(nbytes, sizes['exact']) for preset, nbytes in sizes.items()}
  others = _FILE + _ENTRY * len(source.tensors)
  others += sum(len(zlib.compress(x)) for x in source.files.values())
  return {preset: round(others + sizes[preset]) for preset in sorted(sizes)}


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
    if size < target and _is_exact(sizes):
      break
    step += _BITS * (size - aim) / size
    if min(sizes.values()) < aim < max(sizes.values()):
      step = _interpolated(sizes, aim)
    step = min(max(round(step, 3), passes.FINEST), passes.COARSEST)
  fitting = [step for step, size in sizes.items() if size <= target]
  least, most = min(sizes.values()), max(sizes.values())
  is_too_small = most < target and min(sizes) <= passes.FINEST
  if not fitting or (is_too_small and not _is_exact(sizes)):
    text = f'files of {least:,} to {most:,} bytes, none of about {target:,}'
    raise ValueError(f'near has steps from 2^{passes.FINEST:g} on, and wrote {text}')
  write(min(fitting), range(target + 1))


def _interpolated(sizes: dict[float, int], aim: float) -> float:
  """Returns the step at which a file has about a size, given sizes around it."""
  steps, most = sorted(sizes, reverse=True), max(sizes.values())
  # Finer steps than the coarsest one with which all bits are kept change nothing.
  finest = next(step for step in steps if most - sizes[step] < _SAME)
  chosen = [step for step in steps if step >= finest]
  return float(np.interp(aim, [sizes[step] for step in chosen], chosen))


def _is_exact(sizes: dict[float, int]) -> bool:
  """Returns whether finer steps make no larger file, because it has all bits."""
  finest = [sizes[step] for step in sorted(sizes)[:2]]
  return len(finest) > 1 and abs(finest[0] - finest[1]) < _SAME
