"""A sliced model beside its dense base: products with the bases of its subspaces.

`structured.subspaces` has the mathematics, and `fit` finds the bases. The
basis of a segment is a record of its own, before the layer that writes the segment, so
that a layer is read without the layers before it. With a preset that keeps all bits,
bases are those of the checkpoint, and a tensor is its difference from a product. Else
the residual stream is rotated to the bases that subspaces tell, and a tensor that
follows its product is that product. Where it cannot be rotated, as `passes.residual`
says, bases are those of the checkpoint, too.
"""

from collections.abc import Callable, Mapping
import functools
import math
import threading
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.passes import residual
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.relative import fit
from rotbits_jax.relative import rounding_errors
from rotbits_jax.structured import subspaces
from rotbits_jax.symmetries import rotations
from rotbits_jax.system import host

_MOST_SEGMENTS = 8  # that are held; two layers at a time need five
_MOST_ARRAYS = 32  # of the base, that are held
_UNRELATED = 0.3  # the relative error of equations from which there is no subspace


class _Segment(NamedTuple):
  """A segment of the sliced model.

  Attributes:
    leaf: its basis in the file; None for the identity, or if there is no basis.
    basis: the array of the leaf; None if there is none.
    turn: the rotation of the segment, float64 `[d, d]`; None for none.
    known: whether a basis was found.
  """

  leaf: Any
  basis: np.ndarray | None
  turn: np.ndarray | None
  known: bool


class _Array(NamedTuple):
  """An array of the base, its entry in the manifest, and its greatest number."""

  array: np.ndarray
  entry: entries.BaseArray
  greatest: float


class Recipe:
  """A sliced model as a source of `passes.rewrite`, beside its base.

  Attributes:
    config: config of the sliced model.
    records: those of the model, and those of the bases.
  """

  def __init__(self, source: Any, base: base_lib.Base, *, keeps_bits: bool):
    """Takes a model that suits the base, see `suits`.

    Args:
      source: the sliced model.
      base: the dense model.
      keeps_bits: whether the bases are those of the checkpoint.
    """
    assert source.config is not None
    assert base.config is not None
    self.config = source.config
    self._source, self._base, self._keeps_bits = source, base, keeps_bits
    self._made_of = fit.ingredients(base.config, self.config)
    given: Any = source
    self._context = passes.make_context(given, stored_as=source.stored_as)
    # Arrays of the base may be rounded to these dtypes after they are centred.
    dtypes = np.float32, self._context.dtype
    self._most = min(float(jnp.finfo(x).max) for x in dtypes) / 2
    self._lock = threading.RLock()
    self._segments = functools.lru_cache(_MOST_SEGMENTS)(self._segment)
    self._array = functools.lru_cache(_MOST_ARRAYS)(self._find)
    self._given = functools.lru_cache(2)(self._read)
    step = self.config.segments_per_layer
    self.records: tuple[str, ...] = ()
    for record in source.records:
      index = models.names.layer_index(record)
      if index is not None:
        own = range(index * step + (index > 0), (index + 1) * step + 1)
        self.records += tuple(map(models.names.subspace, own))
      self.records += (record,)

  @functools.cached_property
  def is_related(self) -> bool:
    """Whether the first tensors of the model are products with the base at all."""
    return min(x.error for x in self._first.values()) < _UNRELATED

  @property
  def obstacle(self) -> str:
    """Why the residual stream cannot be rotated; '' if it can."""
    return residual.obstacle(self._context)

  @functools.cached_property
  def _first(self) -> dict[bool, fit.FoundBasis]:
    return {x: self._fit(0, x) for x in (False, True)}

  @functools.cached_property
  def _rounded(self) -> bool:
    """Whether the slicer rounded the tensors of the base after the norms were fused."""
    return self._first[True].error < self._first[False].error

  # ---- a source

  def specs(self, record: str) -> models.Params:
    """Returns shapes and dtypes; a basis is none of the model's parameters."""
    if models.names.subspace_index(record) is not None:
      return {}
    return self._source.specs(record)

  def read(self, record: str) -> models.Params:
    """Returns a record: as it is, rotated, or the basis of a segment."""
    segment = models.names.subspace_index(record)
    if segment is not None:
      leaf = self.segment(segment).leaf
      return {} if leaf is None else {record: {'basis': leaf}}
    if self._keeps_bits or record == models.names.BUFFERS:
      return self._source.read(record)
    params = structured.astype(self._given(record), np.float32)
    return structured.unflatten(self._turned(record, params))

  def outer(self) -> models.Params:
    found: models.Params = {}
    for name in models.outer_shapes(self.config):
      found |= self.read(name)
    return found

  def _read(self, record: str) -> dict[str, Any]:
    """Returns the leaves of a record; those that `free` made become arrays again."""
    found = structured.flatten(self._source.read(record))
    given = [x for x in found.values() if structured.is_structured(x)]
    needed = {name: self._source.resolve(name) for x in given for name in x.needs}
    wide = structured.expand(needed | found, keep_factors=True)
    return {path: wide[path] for path in found}

  def _turned(self, record: str, params: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a record in the coordinates of the subspaces."""
    index, step = models.names.layer_index(record), self.config.segments_per_layer
    if index is None:
      axes = models.layout.outer_axes(self.config)
      segments: Any = 0, len(self.config.segment_widths) - 1
    else:
      prefix = models.names.prefix(index)
      own = models.layout.layer_axes(self.config)
      axes = {f'{prefix}{path}': x for path, x in own.items()}
      segments = range(index * step, (index + 1) * step + 1)
    turns = [self.segment(i).turn for i in segments]
    of = lambda segment: None if segment is None else turns[segment]
    return {
      path: _rotated(leaf, *map(of, rotations.sides(axes[path])))
      for path, leaf in params.items()
    }

  # ---- the segments

  def segment(self, segment: int) -> _Segment:
    """Returns a segment; threads that need the same one wait for it."""
    with self._lock:
      return self._segments(segment)

  def _fit(self, segment: int, rounded: bool) -> fit.FoundBasis:
    """Finds the basis of a segment from the tensors that read or write it."""
    config = self.config
    step = config.segments_per_layer
    last = config.num_layers * step
    places = [i // step for i in (segment - 1, segment) if 0 <= i < last]
    records = list(dict.fromkeys(map(models.names.layer, places)))
    records += ['embed'] if segment == 0 else []
    records += ['head'] if segment == last else []
    pairs = []
    for path, leaf in (
      (x, y) for name in records for x, y in self._given(name).items()
    ):
      own = self._made_of.get(path)
      if own is None or own.segments != (segment,) or structured.is_structured(leaf):
        continue
      arrays = self._arrays(own)
      if arrays is not None and np.isfinite(np.asarray(leaf, np.float32)).all():
        pairs.append(fit.Pair(own.way, arrays, np.asarray(leaf)))
    shape = config.hidden_size, config.segment_widths[segment]
    roundoff = self._context.roundoff
    return fit.fit(pairs, shape, rounded=rounded, roundoff=roundoff)

  def _arrays(self, made_of: fit.Ingredients) -> list[np.ndarray] | None:
    """Returns the arrays of the base; None if it lacks one that can be multiplied."""
    found = [x for path in made_of.paths if (x := self._array(path)) is not None]
    is_scaled = made_of.way.kind == 'reads'
    if len(found) < len(made_of.paths) or (
      is_scaled and math.prod(x.greatest for x in found) > self._most
    ):
      return None
    return [x.array for x in found]

  def _find(self, path: str) -> _Array | None:
    array = self._base.array(path)
    if array is None:
      return None
    greatest = float(np.abs(array).max(initial=0))
    if not greatest <= self._most:  # also if it is NaN
      return None
    return _Array(array, entries.BaseArray.of(path, array), greatest)

  def _segment(self, segment: int) -> _Segment:
    if segment == 0:
      basis, error, growth = self._first[self._rounded]
    else:
      basis, error, growth = self._fit(segment, self._rounded)
    if basis is None or error > _UNRELATED:
      return _Segment(None, None, None, False)
    roundoff = self._context.roundoff
    if self._keeps_bits:
      leaf: Any = fit.as_basis(basis, roundoff)
      return _Segment(leaf, leaf.materialize(), None, True)
    if basis.shape[0] == basis.shape[1]:
      return _Segment(None, None, basis.T, True)
    if subspaces.is_narrow(basis.shape):
      leaf = fit.as_basis(basis, roundoff)
    else:
      leaf = fit.as_subspace(basis, roundoff, growth)
    found = leaf.materialize()
    turn = fit.turn(basis, np.ldexp(found.astype(np.float64), -subspaces.UNIT))
    return _Segment(leaf, found, turn, True)

  # ---- the tensors

  def beside(
    self, params: Mapping[str, Any], resolve: Callable[[str], Any]
  ) -> dict[str, base_lib.Beside]:
    """Finds the arrays that take fewer bytes beside products or the base.

    Args:
      params: leaves of a record by path, as they are stored without a base.
      resolve: returns the parameters that leaves need.

    Returns:
      How to store these arrays, by path.
    """
    found, others = {}, dict(params)
    for path, leaf in params.items():
      made = None if structured.is_structured(leaf) else self._product(path, leaf)
      if made is not None:
        found[path] = made
      if path in self._made_of:
        del others[path]
    return found | self._base.beside(others, resolve)

  def _product(self, path: str, leaf: Any) -> base_lib.Beside | None:
    own = self._made_of.get(path)
    if own is None:
      return None
    segments = [self.segment(i) for i in own.segments]
    arrays = self._arrays(own)
    if arrays is None or not all(x.known for x in segments):
      return None
    target = host.contiguous(np.asarray(leaf))
    way = own.way._replace(rounded=self._rounded and own.way.kind != 'shortcut')
    made = subspaces.tensor(
      way, arrays, [x.basis for x in segments], target.shape, target.dtype
    )
    product = entries.Product(
      kind=way.kind,
      arrays=tuple(x.entry for x in map(self._array, own.paths) if x),
      segments=own.segments,
      transposed=way.transposed,
      centred=way.centred,
      rounded=way.rounded,
    )
    if not self._keeps_bits:
      roundoff = self._context._replace(dtype=target.dtype).roundoff
      limit = fit.error_limit(way, self.config.hidden_size, roundoff)
      norms = fit.vector_norms(way, arrays, target.dtype)
      both = (target.T, made.T) if way.kind == 'reads' else (target, made)
      if rounding_errors.explain(*both, limit, norms):
        target = made
    return base_lib.beside_product(target, made, product)


def _rotated(leaf: Any, rows: np.ndarray | None, columns: np.ndarray | None) -> Any:
  """Returns `rows^T @ leaf @ columns` in float32."""
  if structured.is_structured(leaf):
    turns = (
      None if x is None else jnp.asarray(x, jnp.float32) for x in (rows, columns)
    )
    return rotations.rotate(leaf, *turns)
  # NumPy needs no program for each shape.
  found = np.asarray(leaf, np.float32)
  found = found if rows is None else rows.T.astype(np.float32) @ found
  return found if columns is None else found @ columns.astype(np.float32)


def suits(source: Any, base: base_lib.Base) -> bool:
  """Returns whether a model may be sliced from a base, by their configs."""
  own, dense = source.config, base.config
  if own is None or dense is None or not own.sliced or dense.sliced:
    return False
  try:
    return dense.sliced_to(own.segment_widths) == own
  except ValueError:  # another number of segments
    return False
