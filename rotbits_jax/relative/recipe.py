"""A sliced model relative to its dense base: products with the bases of its subspaces.

The basis of a segment is a record of its own, before the layer that writes the segment,
so a layer is read without those before it. If all bits are kept, or the residual stream
cannot be rotated, bases are those of the checkpoint, and a tensor is its difference
from a product. Else the model is rotated to the bases that subspaces tell, and a tensor
that follows its product is that product.
"""

from collections.abc import Callable, Mapping
import functools
import threading
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.passes import residual
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.relative import measure
from rotbits_jax.relative import products
from rotbits_jax.relative import rounding_errors
from rotbits_jax.slicing import fit
from rotbits_jax.structured.subspaces import UNIT
from rotbits_jax.structured.subspaces import Basis
from rotbits_jax.symmetries import least_squares
from rotbits_jax.symmetries import rotations
from rotbits_jax.system import host

_MOST_SEGMENTS = 8  # that are held; two layers at a time need five
_MOST_ARRAYS = 32  # of the base, that are held
_UNRELATED = 0.3  # the relative error of equations from which there is no subspace
# Products are made of integers, whose errors may be greater than those of float32.
_LEAST_ROUNDOFF = 2.0**-16
# The errors of shortcuts add up along the residual stream. SliceGPT multiplies rounded
# bases, and such a product has errors of 0.8 roundoffs; one that was rounded once, 0.6.
_SHORTCUT = 0.7


class _Segment(NamedTuple):
  """The basis of a segment of the sliced model."""

  leaf: Basis
  numbers: np.ndarray  # the array of the leaf
  rotation: np.ndarray | None  # of the segment, float64 [d, d]; None for none


class Recipe:
  """A sliced model given its base, as a `passes.Source` with records of the bases."""

  def __init__(self, source: Any, base: base_lib.Base, *, keeps_bits: bool):
    """Takes a model sliced from the base; `keeps_bits` keeps the checkpoint's bases."""
    self.config: models.ModelConfig = source.config
    self.stored_as: str | None = source.stored_as
    if not keeps_bits and isinstance(source, models.Model):
      source = source.materialize()  # a leaf that another encoding has made structured
    self._source, self._base = source, base
    self._context = passes.make_context(source)
    keeps_bits = keeps_bits or residual.obstacle(self._context) is not None
    self._rotates = not keeps_bits
    self._lock = threading.RLock()
    self._segments = functools.lru_cache(_MOST_SEGMENTS)(self._segment)
    self._array = functools.lru_cache(_MOST_ARRAYS)(self._array_of_base)
    self._flat = functools.lru_cache(2)(lambda x: structured.flatten(source.read(x)))
    self.records: tuple[str, ...] = ()
    for record in source.records:
      index = models.names.layer_index(record)
      # The first layer has the segment of the embedding, too.
      written = () if index is None else self._ends(index)[min(index, 1) :]
      self.records += *map(models.names.subspace, written), record

  @functools.cached_property
  def is_related(self) -> bool:
    """Whether the first tensors of the model are products with the base at all."""
    return self._first[1].error < _UNRELATED

  @functools.cached_property
  def _first(self) -> tuple[bool, fit.Fit]:
    """Whether the slicer rounded tensors of the base; and the basis of segment 0."""
    fits = {is_rounded: self._fit(0, is_rounded) for is_rounded in (False, True)}
    return min(fits.items(), key=lambda x: x[1].error)

  def specs(self, record: str) -> models.Params:
    """Returns shapes and dtypes; a basis is none of the model's parameters."""
    is_basis = models.names.subspace_index(record) is not None
    return {} if is_basis else self._source.specs(record)

  def read(self, record: str) -> models.Params:
    """Returns a record: as it is, rotated, or the basis of a segment."""
    index = models.names.subspace_index(record)
    if index is not None:
      segment = self.segment(index)
      return {} if segment is None else {record: {'basis': segment.leaf}}
    if not self._rotates or record == models.names.BUFFERS:
      return self._source.read(record)
    rotated = {}
    for path, array in self._flat(record).items():
      segments = [None if i is None else self.segment(i) for i in self._sides(path)]
      rows, columns = (None if x is None else x.rotation for x in segments)
      product = np.asarray(array, np.float32)  # by NumPy, which compiles no program
      product = product if rows is None else np.float32(rows.T) @ product
      product = product if columns is None else product @ np.float32(columns)
      rotated[path] = structured.astype(product, self._context.dtype_of(path))
    return structured.unflatten(rotated)

  # ---- the segments

  def _ends(self, layer: int | None) -> range:
    """Returns the segments of a layer; for None, those of the whole model."""
    step = self.config.segments_per_layer
    first, count = (0, self.config.num_layers) if layer is None else (layer, 1)
    return range(first * step, (first + count) * step + 1)

  def _sides(self, path: str) -> tuple[int | None, int | None]:
    """Returns the segments of the rows and the columns of a parameter; or None."""
    layer, layout = models.names.layer_index(path), models.layout
    axes = layout.outer_axes if layer is None else layout.layer_axes
    name, segments = path.removeprefix(models.names.prefix(layer)), self._ends(layer)
    rows, columns = rotations.sides(axes(self.config).get(name, ('norm',)))
    of = lambda axis: None if axis is None else segments[axis]
    return of(rows), of(columns)

  def segment(self, index: int) -> _Segment | None:
    """Returns a segment; None if it has no basis. Threads wait for the same one."""
    with self._lock:
      return self._segments(index)

  def _segment(self, index: int) -> _Segment | None:
    (is_rounded, first), roundoff = self._first, self._context.roundoff
    basis, error = first if index == 0 else self._fit(index, is_rounded)
    if basis is None or error > _UNRELATED:
      return None
    leaf = Basis.near(basis, roundoff, keeps_basis=not self._rotates)
    numbers, rotation = leaf.materialize(), None
    if self._rotates:  # the two have the same subspace, up to rounding
      rotation = least_squares.orthonormal(basis.T @ np.ldexp(numbers, -UNIT))
      if rotation is None:
        return None
    return _Segment(leaf, numbers, rotation)

  def _fit(self, segment: int, is_rounded: bool) -> fit.Fit:
    """Finds the basis of a segment from the tensors that read or write it."""
    layers = [i for i in range(self.config.num_layers) if segment in self._ends(i)]
    records = [*map(models.names.layer, layers)]
    records += ['embed'] * (segment == 0) + ['head'] * (segment == self._ends(None)[-1])
    tensors: list[fit.Equations] = []
    for path, leaf in (x for name in records for x in self._flat(name).items()):
      if segment in self._sides(path) and not structured.is_structured(leaf):
        product, dense = self._product(path, is_rounded)
        if product is not None and product.kind != 'shortcut':
          target = np.asarray(leaf)
          tensors.append(functools.partial(product.equations, dense, target))
    shape = self.config.hidden_size, self.config.segment_widths[segment]
    return fit.fit(tensors, shape, self._context.roundoff)

  # ---- the tensors

  def _product(
    self, path: str, is_rounded: bool
  ) -> tuple[products.Product | None, list[np.ndarray]]:
    """Returns the product that a tensor is, or None; and the tensors of the base."""
    (rows, columns), layer = self._sides(path), models.names.layer_index(path)
    if rows is not None and columns is not None:
      return products.Product(kind='shortcut', segments=(rows, columns)), []
    dense, prefix = self._base.config, models.names.prefix(layer)
    assert dense is not None
    module, _, name = path.rpartition('/')
    sublayer = module.removeprefix(prefix).partition('/')[0]
    norm = prefix + models.layout.norm_of(dense, sublayer) if prefix else 'final_norm'
    has_mean, is_tied = dense.norm == 'layernorm', module == 'head' and dense.tied_head
    kernel = 'embed/tokens' if is_tied else f'{module}/kernel'
    facts: dict[str, Any]
    if columns is not None:
      facts = {'kind': 'writes', 'segments': (columns,), 'centred': has_mean}
      paths = [path]
    elif rows is not None:
      facts = {'kind': 'reads', 'segments': (rows,), 'transposed': is_tied}
      paths = [kernel, f'{norm}/scale']
    elif has_mean and name == 'bias' and self._sides(f'{module}/kernel')[0] is not None:
      facts = {'kind': 'bias', 'transposed': is_tied}
      paths = [kernel, f'{norm}/bias', *([path] if self._base.find(path) else [])]
    else:
      return None, []
    arrays = [x for x in map(self._array, paths) if x is not None]
    if len(arrays) < len(paths):
      return None, []
    numbers, known = map(tuple, zip(*arrays, strict=True))
    return products.Product(**facts, rounded=is_rounded, arrays=known), [*numbers]

  def _array_of_base(self, path: str) -> tuple[np.ndarray, entries.BaseArray] | None:
    """Returns a finite array of the base and its entry in the manifest; or None."""
    array = self._base.array(path)
    if array is None or not np.isfinite(array).all():
      return None
    array = host.contiguous(array)
    return array, entries.BaseArray.of(path, array)

  def beside(
    self, params: Mapping[str, Any], resolve: Callable[[str], Any]
  ) -> dict[str, measure.Measured]:
    """Returns how to store arrays beside products or the base, if that saves bytes."""
    stored, others = dict[str, measure.Measured](), dict[str, Any]()
    for path, leaf in params.items():
      is_array = not structured.is_structured(leaf)
      product, dense = self._product(path, self._first[0]) if is_array else (None, [])
      if product is None:
        others[path] = leaf
      elif measured := self._beside_product(np.asarray(leaf), product, dense):
        stored[path] = measured
    return stored | self._base.beside(others, resolve)

  def _beside_product(
    self, target: np.ndarray, product: products.Product, dense: list[np.ndarray]
  ) -> measure.Measured | None:
    """Returns how to store a tensor beside its product; None if it is not worth it."""
    segments = [x for x in map(self.segment, product.segments) if x is not None]
    if len(segments) < len(product.segments):
      return None
    bases, target = [x.numbers for x in segments], host.contiguous(target)
    try:
      tensor = product.tensor(dense, bases, target.shape, target.dtype)
    except ValueError:  # some numbers are not finite when a norm has scaled them
      return None
    limit = max(float(ml_dtypes.finfo(target.dtype).eps) / 2, _LEAST_ROUNDOFF)
    limit *= _SHORTCUT if product.kind == 'shortcut' else 1
    vectors = (target, tensor) if product.kind != 'reads' else (target.T, tensor.T)
    if self._rotates and rounding_errors.explain(*vectors, limit):
      target = tensor
    measured = measure.beside(target, tensor)
    return measured and measured._replace(known=product)
