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


class _Ingredients(NamedTuple):
  """The parts of which a tensor of a sliced model is made.

  Attributes:
    way: how it is made.
    paths: of tensors of the base, in the order of `subspaces.tensor`.
    segments: the segments of the model whose bases are needed.
  """

  way: subspaces.Way
  paths: tuple[str, ...]
  segments: tuple[int, ...]


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
    self._made_of = _ingredients(base.config, self.config)
    given: Any = source
    self._context = passes.make_context(given, stored_as=source.stored_as)
    # A tensor of the base is multiplied by a scale, and may be rounded then.
    dtypes = np.float32, self._context.dtype
    self._most = min(math.sqrt(float(jnp.finfo(x).max)) for x in dtypes)
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
    for path, leaf in (x for name in records for x in self._given(name).items()):
      made_of = self._made_of.get(path)
      if made_of is None or made_of.segments != (segment,):
        continue
      arrays = self._arrays(made_of)
      if structured.is_structured(leaf) or arrays is None:
        continue
      if np.isfinite(np.asarray(leaf, np.float32)).all():
        way = made_of.way._replace(rounded=rounded)
        pairs.append(fit.Pair(way, [x for x, _ in arrays], np.asarray(leaf)))
    shape = config.hidden_size, config.segment_widths[segment]
    return fit.fit(pairs, shape, self._context.roundoff)

  def _arrays(
    self, made_of: _Ingredients
  ) -> list[tuple[np.ndarray, entries.BaseArray]] | None:
    """Returns the arrays of the base; None if it lacks one that can be multiplied."""
    arrays = [self._array(path) for path in made_of.paths]
    complete = [x for x in arrays if x is not None]
    return complete if len(complete) == len(arrays) else None

  def _find(self, path: str) -> tuple[np.ndarray, entries.BaseArray] | None:
    """Returns an array of the base, and its entry in the manifest."""
    array = self._base.array(path)
    # The comparison is false if a number is NaN.
    if array is None or not float(np.abs(array).max(initial=0)) <= self._most:
      return None
    return array, entries.BaseArray.of(path, array)

  def _segment(self, segment: int) -> _Segment:
    if segment == 0:
      found = self._first[self._rounded]
    else:
      found = self._fit(segment, self._rounded)
    basis, roundoff = found.basis, self._context.roundoff
    if basis is None or found.error > _UNRELATED:
      return _Segment(None, None, None, False)
    if self._keeps_bits:
      leaf: Any = found.as_basis(roundoff)
      return _Segment(leaf, leaf.materialize(), None, True)
    if basis.shape[0] == basis.shape[1]:
      return _Segment(None, None, basis.T, True)
    is_narrow = subspaces.is_narrow(basis.shape)
    leaf = found.as_basis(roundoff) if is_narrow else found.as_subspace(roundoff)
    numbers = leaf.materialize()
    # The two have the same subspace, up to rounding.
    near = np.ldexp(numbers.astype(np.float64), -subspaces.UNIT)
    return _Segment(leaf, numbers, fit.orthonormal(basis.T @ near), True)

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
    products = {}
    for path, made_of in self._made_of.items():
      leaf = params.get(path)
      if leaf is not None and not structured.is_structured(leaf):
        product = self._product(np.asarray(leaf), made_of)
        if product is not None:
          products[path] = product
    others = {x: y for x, y in params.items() if x not in self._made_of}
    return products | self._base.beside(others, resolve)

  def _product(
    self, target: np.ndarray, made_of: _Ingredients
  ) -> base_lib.Beside | None:
    """Returns how to store a tensor beside its product; None if it is not worth it."""
    segments, arrays = [*map(self.segment, made_of.segments)], self._arrays(made_of)
    if arrays is None or not all(x.known for x in segments):
      return None
    target, dense = host.contiguous(target), [x for x, _ in arrays]
    way = made_of.way
    way = way._replace(rounded=self._rounded and way.kind != 'shortcut')
    bases = [x.basis for x in segments]
    made = subspaces.tensor(way, dense, bases, target.shape, target.dtype)
    product = entries.Product(
      **way._asdict(), arrays=tuple(x for _, x in arrays), segments=made_of.segments
    )
    roundoff = self._context._replace(dtype=target.dtype).roundoff
    if not self._keeps_bits and fit.Pair(way, dense, target).is_rounded(made, roundoff):
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


def _ingredients(
  dense: models.ModelConfig, sliced: models.ModelConfig
) -> dict[str, _Ingredients]:
  """Returns the ingredients of the parameters that slicing changes, by path."""
  layer, outer = models.layout.layer_axes(sliced), models.layout.outer_axes(sliced)
  step, found = sliced.segments_per_layer, {}
  has_mean = dense.norm == 'layernorm'
  known = {*models.layout.layer_axes(dense), *models.layout.outer_axes(dense)}

  def add(
    name: str, axes: models.layout.Axes, path: str, norm: str, first: int, last: int
  ) -> None:
    segment = lambda axis: first + axis if axis >= 0 else last
    sides, head = axes[path], path.startswith('head/')
    kernel = f'{path.rpartition("/")[0]}/kernel'
    source = 'embed/tokens' if head and dense.tied_head else f'{name}{kernel}'
    tied = head and dense.tied_head
    if '_shortcut' in path:
      made = _Ingredients(
        subspaces.Way('shortcut'), (), (segment(sides[0]), segment(sides[1]))
      )
    elif isinstance(sides[-1], int):
      way = subspaces.Way('writes', centred=has_mean)
      made = _Ingredients(way, (f'{name}{path}',), (segment(sides[-1]),))
    elif isinstance(sides[0], int):
      way = subspaces.Way('reads', transposed=tied)
      made = _Ingredients(way, (source, f'{norm}/scale'), (segment(sides[0]),))
    elif has_mean and isinstance(axes.get(kernel, ('',))[0], int):
      way = subspaces.Way('bias', transposed=tied)
      bias = (f'{name}{path}',) if path in known else ()
      made = _Ingredients(way, (source, f'{norm}/bias', *bias), ())
    else:
      return
    found[f'{name}{path}'] = made

  for i in range(sliced.num_layers):
    name = models.names.prefix(i)
    for path in layer:
      norm = models.layout.norm_of(dense, path.partition('/')[0])
      add(name, layer, path, f'{name}{norm}', i * step, (i + 1) * step)
  for path in outer:
    add('', outer, path, 'final_norm', 0, sliced.num_layers * step)
  return found


def suits(source: Any, base: base_lib.Base) -> bool:
  """Returns whether a model may be sliced from a base, by their configs."""
  own, dense = source.config, base.config
  if own is None or dense is None or not own.sliced or dense.sliced:
    return False
  try:
    return dense.sliced_to(own.segment_widths) == own
  except ValueError:  # another number of segments
    return False
