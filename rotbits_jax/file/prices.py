"""Prices of arrays: about how many bytes they take in a file, from samples.

`free` and `near` choose coordinates for a whole model. Where the arrays are cheaper as
they are, because they were quantised, pruned or widened before, such coordinates would
hide this. So a source is priced before it is rewritten, see `choose`.
"""

import collections
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import quantisers
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.relative import entries as entries_lib
from rotbits_jax.relative import measure
from rotbits_jax.structured import difference

NEARLY = 0.995
"""Of a price: the estimates of a price differ by less than the rest of it."""

RECORDS = 3
"""Records of one kind that are read."""

_ELEMENTS = 1 << 18  # of a sample
_LINES = 16  # rows that show zeros
_ZEROS = 1 / 16  # share of zeros that rotations would lose
_PATTERNED = 1 / 64  # share of the bytes whose patterns are worth a closer look


class Choice(NamedTuple):
  """Whether a source is stored as `exact` stores it."""

  is_exact: bool
  nbytes: float  # about the bytes of all records, stored so


def choose(source: passes.Source, preset: presets.Preset) -> Choice:
  """Compares the price of a model as it is with the price after the transforms.

  The latter takes time, because some layers are rewritten. It is left out if all
  arrays look like any others, because then fewer elements take fewer bytes.

  Args:
    source: a model whose weights have the dtypes in which they are stored.
    preset: `free` or `near`, with their transforms.
  """
  nbytes, patterned = _as_they_are(source)
  context = passes.make_context(source)
  rounding, config = preset.rounding, context.config
  is_fine = rounding is not None and rounding.is_finer_than(context.dtype)
  if config.sliced and patterned < _PATTERNED * nbytes and not is_fine:
    return Choice(False, nbytes)
  if config.sliced:
    nbytes -= _saved_by_head(context)
  if rounding is not None:  # errors of inputs take time
    preset = preset._replace(rounding=rounding._replace(inputs={}))
  rewritten, _ = rewritten_bytes(source, preset)
  return Choice(nbytes < rewritten, nbytes)


def _as_they_are(source: passes.Source) -> tuple[float, float]:
  """Returns about the bytes of all arrays as they are, and those of patterned ones.

  The arrays of one shape and dtype, with patterns or without, are priced by a few.
  """
  counts = collections.Counter[Any]()
  total = patterned = 0.0
  prices = collections.defaultdict[Any, list[float]](list)
  for record in source.records:
    for path, leaf in structured.flatten(source.read(record)).items():
      key = structured.stack_key(leaf), is_patterned(leaf)
      counts[key] += 1
      if len(prices[key]) < RECORDS:
        prices[key].append(array_bytes(path, leaf, None))
  for key, of_key in prices.items():
    nbytes = counts[key] * sum(of_key) / len(of_key)
    total += nbytes
    patterned += nbytes * key[1]
  return total, patterned


def is_patterned(leaf: Any) -> bool:
  """Returns whether a leaf has structure that other coordinates would hide.

  It is a structured leaf, or a matrix in which elements repeat, or are zero.
  """
  if structured.is_structured(leaf):
    return True
  if not passes.is_matrix(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
    return False
  array = np.asarray(leaf)
  rows = array.reshape(-1, array.shape[-1])
  some = rows[:: max(len(rows) // _LINES, 1)]
  if np.count_nonzero(some == 0) > _ZEROS * some.size:
    return True
  return quantisers.repeats(array)


def _saved_by_head(context: passes.Context) -> float:
  """Returns the bytes that `exact` saves by storing the embedding beside the head."""
  path, params = 'embed/tokens', context.read(None)
  table, needed = params[path], dict(params)
  changed, _ = passes.retie_exactly().outer(context, None, params)
  leaf = changed[path]
  if not isinstance(leaf, difference.Difference):
    return 0.0
  arrays = (structured.materialize(needed[x]) for x in leaf.needs)
  beside_head = measure.of_leaf(leaf, *map(jax.device_get, arrays))
  return array_bytes(path, table, None) - beside_head.estimate()


class _FewLayers:
  """The first layers of a source, and all that is outside the layers."""

  def __init__(self, source: passes.Source, config: models.ModelConfig):
    self._source, self.config = source, config
    self.stored_as = source.stored_as
    layers = set(map(models.names.layer, range(config.num_layers)))
    is_other = lambda name: models.names.layer_index(name) is None
    self.records = tuple(x for x in source.records if x in layers or is_other(x))

  def specs(self, record: str) -> models.Params:
    return self._source.specs(record)

  def read(self, record: str) -> models.Params:
    return self._source.read(record)


def rewritten_bytes(
  source: passes.Source, preset: presets.Preset
) -> tuple[float, float]:
  """Returns about the bytes of a preset, and the share of elements that it stores."""
  config: models.ModelConfig = source.config
  widths, count, step = (
    config.segment_widths,
    config.num_layers,
    config.segments_per_layer,
  )
  is_even = count > RECORDS and widths[RECORDS * step] == widths[-1]
  chosen = RECORDS if is_even else count
  small = msgspec.structs.replace(
    config, num_layers=chosen, segment_widths=widths[: chosen * step + 1]
  )
  few = _FewLayers(source, small)
  context, nbytes, elements = passes.make_context(few), 0.0, 0
  rewritten = passes.rewrite(context, preset.transform, rounding=preset.rounding)
  for record in itertools.chain.from_iterable(records for records, _ in rewritten):
    # The second layer stands for those that are not read.
    weight = 1 + (count - chosen) * (record.name == models.names.layer(1))
    leaves = structured.flatten(record.params)
    elements += weight * sum(map(structured.count_elements, leaves.values()))
    arrays = list[np.ndarray]()
    for leaf in leaves.values():
      if isinstance(leaf, difference.Difference):  # an embedding beside its head
        needed = (_leaf_of(source, path) for path in leaf.needs)
        nbytes += measure.of_leaf(leaf, *needed).estimate()
      else:
        arrays += stored(leaf)[1].values()
    nbytes += weight * coder.estimate(arrays)
  return nbytes, elements / models.count_elements(config)


def _leaf_of(source: passes.Source, path: str) -> np.ndarray:
  """Returns the array of a parameter of a source."""
  leaf = structured.flatten(source.read(path.partition('/')[0]))[path]
  return np.asarray(structured.materialize(leaf))


def array_bytes(path: str, leaf: Any, rounding: passes.Rounding | None) -> float:
  """Returns about the bytes of an array, from some rows of it, rounded.

  Args:
    path: of the parameter.
    leaf: an array or a structured leaf, which is stored as it is.
    rounding: to a uniform step; None to keep the bits, perhaps by codes.
  """
  if structured.is_structured(leaf):
    return coder.estimate([*stored(leaf)[1].values()])
  array = np.asarray(leaf)
  if rounding is None and (codes := quantisers.find(array)) is not None:
    return quantisers.nbytes(codes)
  rows = array.reshape(-1, (array.shape[-1] if array.ndim > 1 else 1) or 1)
  sample = np.ascontiguousarray(rows[:: max(array.size // _ELEMENTS, 1)])
  of_sample: Any = sample if rounding is None else rounded(rounding, path, sample)
  nbytes = coder.estimate([*stored(of_sample)[1].values()])
  return nbytes * len(rows) / max(len(sample), 1)


def is_rounded(leaf: Any) -> bool:
  """Returns whether a preset with steps rounds an array."""
  is_float = np.dtype(leaf.dtype) in (np.float16, ml_dtypes.bfloat16, np.float32)
  return is_float and passes.is_matrix(leaf)


def rounded(rounding: passes.Rounding, path: str, leaf: Any) -> Any:
  """Rounds a matrix to a step by its root mean square; returns other leaves."""
  dtype = np.dtype(leaf.dtype)
  if not (structured.is_plain(leaf) and is_rounded(leaf)):
    return leaf
  log2_step = rounding.log2_step(path, dtype)
  if log2_step is None:
    return leaf
  wide = jnp.asarray(leaf, jnp.float32)
  multiples, _ = passes.round_leaf(wide, dtype, log2_step, rounding.uniform)
  return structured.astype(passes.narrowed(jax.device_get(multiples)), dtype)


def stored(leaf: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns the settings and the arrays that stand for an array or a leaf in a file."""
  if structured.is_structured(leaf):
    return leaf.stored()
  return {}, {'': np.asarray(leaf).view(entries_lib.stored_dtype(leaf.dtype.name))}
