"""The steps of the preset `near` with which a file has a given size.

    source -> transforms of `near`, float32 -> some layers -> bytes at a step -> step

The bytes at a step come from the coder's own plans for some of the layers, see
`estimation`. The file that is then written differs from them by nearly the same number
of bytes at every step, so that the next file meets the size if the first one does not.

An array has one of four steps an octave, so that the bytes of a large one jump. Then
the kinds of parameters that jump keep the coarser step, and the others become finer.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import estimation
from rotbits_jax.file import sources
from rotbits_jax.system import progress as progress_lib
from rotbits_jax.system import text as text_lib

WITHIN = 0.01
"""The file has at most the target's bytes, and at least this part fewer."""

_AIMS = 0.996, 0.994, 0.99  # of the target, in each file that is written
_START = -5.0
_ELEMENTS = 1 << 26  # of the layers that are kept in memory
_PRECISION = 1 / 64  # octaves
_HOLDS = 3  # how often kinds that jump are held

Write = Callable[[presets.Preset, range], int]
"""Takes a preset and the sizes to accept. Returns the bytes of the file, which it
writes, and lets appear if it has such a size."""


class Steps(NamedTuple):
  """Steps of `near`.

  Attributes:
    step: see `presets.near`.
    offsets: see `presets.near`.
    sizes: the estimated bytes of each kind of parameters.
  """

  step: float
  offsets: dict[str, float]
  sizes: dict[str, float]

  @property
  def nbytes(self) -> float:
    """The estimated bytes of all."""
    return sum(self.sizes.values())


def write(
  source: sources.Source,
  target: int,
  write_file: Write,
  *,
  progress: bool = False,
  **options: Any,
) -> None:
  """Writes the largest file of the preset `near` that is within a size.

  Args:
    source: the model, of a known family.
    target: the greatest number of bytes of the file. It has at least 99% of them, if
      the arrays are many or small enough that steps between exist.
    write_file: writes a file.
    progress: whether to show the progress on stderr.
    options: those of `near`, but for the step. Offsets are kept as the differences
      between the kinds of parameters.

  Raises:
    ValueError: if no step gives such a size. It names the sizes that there are.
  """
  if source.config is None:
    why = f'{source.reason}; ' if source.reason else ''
    raise ValueError(f'{why}a target size needs a model of a known family')
  if jax.process_count() > 1:
    raise ValueError('a target size needs one process')
  count = source.config.num_layers + 2
  with progress_lib.Progress('sizes', count, 'record', show=progress) as bar:
    bar.stage('compiling, removing gauges')
    sizes = Sizes(source, options, bar)
    bar.stage('finding the step')
    rest = float(sum(estimation.overhead(source)))
    found = sizes.meet(target, _AIMS[0], rest, _START)
    bar.finish()
  size = 0
  for k, aim in enumerate(_AIMS):
    if k:
      found = sizes.meet(target, aim, rest, found.step)
    given = options | {'step': found.step, 'offsets': found.offsets}
    least = min((1 - WITHIN) * target, (aim - WITHIN / 2) / aim * (found.nbytes + rest))
    accepted = range(math.ceil(least) if k + 1 < len(_AIMS) else 0, target + 1)
    size = write_file(presets.near(**given), accepted)
    if size in accepted:
      return
    rest = size - found.nbytes
  raise ValueError(
    f'no file of at most {target:,} bytes was found, but one of {size:,}'
  )


class Sizes:
  """The bytes of a model at the steps of `near`, estimated from some of its layers."""

  def __init__(
    self, source: sources.Source, options: Mapping[str, Any], bar: progress_lib.Progress
  ):
    """Applies the transforms of `near` to every layer, and keeps some of them.

    Args:
      source: the model.
      options: those of `near`, but for the step.
      bar: gets a unit for each layer and one for the others.
    """
    self._options = dict(options)
    self._offsets = dict(options.get('offsets') or {})
    given: Any = source
    self._context = passes.make_context(given, stored_as=source.stored_as)
    config = self._context.config
    largest = models.count_elements(config) // max(config.num_layers, 1)
    most = max(_ELEMENTS // max(largest, 1), 2)
    kept = [None, *estimation.spread(range(config.num_layers), most)]
    parts: Any = passes.Parts(config, {})
    transform = presets.near(**self._options).transform
    for records, _ in passes.rewrite(self._context.widened(), transform):
      parts.add(x for x in records if models.names.layer_index(x.name) in kept)
      bar.update()
    self._likes = config.num_layers / max(len(kept) - 1, 1)
    self._context = self._context._replace(source=parts)
    self._kept = parts.parts
    self._known: dict[Any, float] = {}

  def at(self, step: float, held: Mapping[str, float]) -> Steps:
    """Estimates the bytes at a step.

    Args:
      step: of all kinds of parameters but those that are held.
      held: the steps of these.
    """
    offsets = dict(self._offsets)
    for kind, at in held.items():
      for path in {kind, *(x for x in offsets if models.names.pattern(x) == kind)}:
        offsets[path] = self._offsets.get(path, 0.0) + at - step
    preset = presets.near(**self._options | {'step': step, 'offsets': offsets})
    rounding, found = preset.rounding, dict[str, float]()
    assert rounding is not None
    for name in self._kept:
      rounded = passes.round_part(self._context, name, rounding)
      for path, leaf in structured.flatten(rounded).items():
        kind = models.names.pattern(path)
        size = self._bytes(leaf) * (1 if name is None else self._likes)
        found[kind] = found.get(kind, 0.0) + size
    return Steps(step, offsets, found)

  def _bytes(self, leaf: Any) -> float:
    """Estimates a leaf once: steps that are close round most leaves alike."""
    arrays, kind = jax.tree.flatten(leaf)
    arrays = [np.ascontiguousarray(x) for x in arrays]
    content = ((x.shape, x.dtype.name, zlib_ng.crc32(x.view(np.uint8))) for x in arrays)
    key = kind, *content
    if key not in self._known:
      self._known[key] = estimation.of_leaf(leaf)
    return self._known[key]

  def meet(self, target: int, aim: float, rest: float, step: float) -> Steps:
    """Finds the finest steps with which a file has at most so many bytes.

    Args:
      target: bytes of the file.
      aim: the part of them to aim at.
      rest: bytes of the file besides those that are estimated.
      step: the step to begin with.

    Raises:
      ValueError: if no step gives so many bytes, or so few.
    """
    wanted, held = aim * target - rest, dict[str, float]()
    small, large = self._bracket(wanted, step, passes.FINEST, held)
    if small is None or (large is None and small.step <= passes.FINEST):
      raise ValueError(self._range(target, rest))
    for _ in range(_HOLDS):
      if large is None or small.nbytes > (1 - WITHIN / 4) * wanted:
        break
      jumps = [x for x, n in small.sizes.items() if large.sizes[x] > n]
      held = dict.fromkeys(jumps, small.step) | held
      least = max(small.step - 1, passes.FINEST)
      step = max(small.step - 2 * _PRECISION, least)
      found, large = self._bracket(wanted, step, least, held)
      small = found or small
    return small

  def _bracket(
    self, wanted: float, step: float, finest: float, held: Mapping[str, float]
  ) -> tuple[Steps | None, Steps | None]:
    """Returns the finest steps within so many bytes, and the coarsest beyond them.

    Both are at most `_PRECISION` apart, unless the former have the bytes nearly. One of
    them is None where there are none.
    """
    small: Steps | None = None
    large: Steps | None = None
    elements = models.count_elements(self._context.config)
    while True:
      own = self.at(step, held)
      if own.nbytes <= wanted:
        small = own
      else:
        large = own
      if small is not None and small.nbytes > (1 - WITHIN / 4) * wanted:
        return small, large
      if small is None or large is None:
        change = 8 * (own.nbytes - wanted) / elements
        following = step + change + math.copysign(_PRECISION, change)
        following = min(max(following, finest), passes.COARSEST)
        if following == step:
          return small, large
        step = following
      elif small.step - large.step <= _PRECISION:
        return small, large
      else:
        share = (large.nbytes - wanted) / (large.nbytes - small.nbytes)
        share = min(max(share, 0.1), 0.9)
        step = large.step + share * (small.step - large.step)

  def _range(self, target: int, rest: float) -> str:
    """Returns the message about a target that no step meets."""
    least, most = (
      text_lib.of_bytes(self.at(step, {}).nbytes + rest)
      for step in (passes.COARSEST, passes.FINEST)
    )
    return (
      f'near makes files of about {least} to {most} of this model, '
      f'which {text_lib.of_bytes(target)} is not'
    )
