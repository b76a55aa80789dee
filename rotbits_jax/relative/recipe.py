"""A sliced model beside its dense base: products with the bases of its subspaces.

`products` has the mathematics, and `fit` finds the bases. The basis of a segment is a
record of its own, before the layer that writes the segment, so that a layer is read
without the layers before it. With a preset that keeps all bits, bases are those of the
checkpoint, and a tensor is its difference from a product. Else the residual stream is
rotated to the bases that subspaces tell, and a tensor that follows its product is that
product. Where it cannot be rotated, as `passes.residual` says, bases are those of the
checkpoint, too.
"""

from collections.abc import Callable, Mapping
import functools
import math
import threading
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.passes import residual
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.relative import fit
from rotbits_jax.relative import products
from rotbits_jax.structured import subspaces
from rotbits_jax.symmetries import rotations
from rotbits_jax.system import host

_MOST_SEGMENTS = 8  # that are held; two layers at a time need five
_MOST_ARRAYS = 32  # of the base, that are held
_UNRELATED = 0.3  # the relative error of equations from which there is no subspace


class _Segment(NamedTuple):
  """The basis of a segment of the sliced model."""

  leaf: Any  # in the file; None for the identity
  numbers: np.ndarray | None  # the array of the leaf
  rotation: np.ndarray | None  # of the segment, float64 [d, d]; None for none


class Recipe:
  """A sliced model as a source of `passes.rewrite`, beside its base.

  Attributes:
    config, stored_as: of the sliced model.
    records: those of the model, and those of the bases.
  """

  def __init__(self, source: Any, base: base_lib.Base, *, keeps_bits: bool):
    """Takes a model that suits the base; `keeps_bits` keeps the checkpoint's bases."""
    assert base.config is not None
    self.config: models.ModelConfig = source.config
    self.stored_as: str | None = source.stored_as
    if not keeps_bits and isinstance(source, models.Model):
      source = source.materialize()  # a leaf that another encoding has made structured
    self._source, self._base, self._keeps_bits = source, base, keeps_bits
    self._forms = _forms(base.config, self.config)
    self._sides = _segments(self.config)
    self._context = passes.make_context(source)
    # A tensor of the base is multiplied by a scale, and may be rounded then.
    dtypes = np.float32, self._context.dtype
    self._most = min(math.sqrt(float(jnp.finfo(x).max)) for x in dtypes)
    self._lock = threading.RLock()
    self._segments = functools.lru_cache(_MOST_SEGMENTS)(self._segment)
    self._array = functools.lru_cache(_MOST_ARRAYS)(self._array_of_base)
    self._flat = functools.lru_cache(2)(lambda x: structured.flatten(source.read(x)))
    step = self.config.segments_per_layer
    self.records: tuple[str, ...] = ()
    for record in source.records:
      index = models.names.layer_index(record)
      if index is not None:
        written = range(index * step + (index > 0), (index + 1) * step + 1)
        self.records += tuple(map(models.names.subspace, written))
      self.records += (record,)

  @functools.cached_property
  def is_related(self) -> bool:
    """Whether the first tensors of the model are products with the base at all."""
    return min(x.error for x in self._first.values()) < _UNRELATED

  @property
  def obstacle(self) -> str:
    """Why the residual stream cannot be rotated; '' if it can."""
    return residual.obstacle(self._context) or ''

  @functools.cached_property
  def _first(self) -> dict[bool, fit.FoundBasis]:
    """The basis of segment 0, for tensors that the slicer rounded before, or not."""
    return {x: self._fit(0, x) for x in (False, True)}

  @functools.cached_property
  def _is_rounded(self) -> bool:
    """Whether the slicer rounded the tensors of the base after the norms were fused."""
    return self._first[True].error < self._first[False].error

  # ---- a source

  def specs(self, record: str) -> models.Params:
    """Returns shapes and dtypes; a basis is none of the model's parameters."""
    is_basis = models.names.subspace_index(record) is not None
    return {} if is_basis else self._source.specs(record)

  def read(self, record: str) -> models.Params:
    """Returns a record: as it is, rotated, or the basis of a segment."""
    index = models.names.subspace_index(record)
    if index is not None:
      segment = self.segment(index)
      leaf = None if segment is None else segment.leaf
      return {} if leaf is None else {record: {'basis': leaf}}
    if self._keeps_bits or record == models.names.BUFFERS:
      return self._source.read(record)
    rotated = {}
    for path, array in self._flat(record).items():
      segments = [None if i is None else self.segment(i) for i in self._sides[path]]
      matrices = (None if x is None else x.rotation for x in segments)
      rotated[path] = _times(array, *matrices)
    return structured.unflatten(rotated)

  # ---- the segments

  def segment(self, index: int) -> _Segment | None:
    """Returns a segment; None if it has no basis. Threads wait for the same one."""
    with self._lock:
      return self._segments(index)

  def _segment(self, index: int) -> _Segment | None:
    is_rounded, roundoff = self._is_rounded, self._context.roundoff
    fitted = self._first[is_rounded] if index == 0 else self._fit(index, is_rounded)
    basis = fitted.basis
    if basis is None or fitted.error > _UNRELATED:
      return None
    if self._keeps_bits:
      leaf: Any = fitted.as_basis(roundoff)
      return _Segment(leaf, leaf.materialize(), None)
    if basis.shape[0] == basis.shape[1]:
      return _Segment(None, None, basis.T)
    is_narrow = subspaces.is_narrow(basis.shape)
    leaf = fitted.as_basis(roundoff) if is_narrow else fitted.as_subspace(roundoff)
    numbers = leaf.materialize()
    # The two have the same subspace, up to rounding.
    near = np.ldexp(numbers.astype(np.float64), -subspaces.UNIT)
    return _Segment(leaf, numbers, fit.orthonormal(basis.T @ near))

  def _fit(self, segment: int, is_rounded: bool) -> fit.FoundBasis:
    """Finds the basis of a segment from the tensors that read or write it."""
    step = self.config.segments_per_layer
    last = self.config.num_layers * step
    layers = [i // step for i in (segment - 1, segment) if 0 <= i < last]
    records = list(dict.fromkeys(map(models.names.layer, layers)))
    records += ['embed'] * (segment == 0) + ['head'] * (segment == last)
    pairs = []
    for path, leaf in (x for name in records for x in self._flat(name).items()):
      form, paths = self._forms.get(path, (None, ()))
      if form is None or form.segments != (segment,) or structured.is_structured(leaf):
        continue
      arrays, target = self._arrays(paths), np.asarray(leaf)
      if arrays is not None and np.isfinite(target.astype(np.float32)).all():
        form = msgspec.structs.replace(form, rounded=is_rounded)
        pairs.append(fit.Pair(form, [x for x, _ in arrays], target))
    shape = self.config.hidden_size, self.config.segment_widths[segment]
    return fit.fit(pairs, shape, self._context.roundoff)

  def _arrays(
    self, paths: tuple[str, ...]
  ) -> list[tuple[np.ndarray, entries.BaseArray]] | None:
    """Returns arrays of the base; None if it lacks one that can be multiplied."""
    arrays = [x for x in map(self._array, paths) if x is not None]
    return arrays if len(arrays) == len(paths) else None

  def _array_of_base(self, path: str) -> tuple[np.ndarray, entries.BaseArray] | None:
    """Returns an array of the base, and its entry in the manifest."""
    array = self._base.array(path)
    # The comparison is false if a number is NaN.
    if array is None or not float(np.abs(array).max(initial=0)) <= self._most:
      return None
    return array, entries.BaseArray.of(path, array)

  # ---- the tensors

  def beside(
    self, params: Mapping[str, Any], resolve: Callable[[str], Any]
  ) -> dict[str, base_lib.Beside]:
    """Finds the arrays that take fewer bytes beside products or the base.

    See `base.Base.beside`; the leaves are as they are stored without a base.
    """
    stored = {
      path: self._beside_product(np.asarray(leaf), *self._forms[path])
      for path, leaf in params.items()
      if path in self._forms and not structured.is_structured(leaf)
    }
    others = {x: y for x, y in params.items() if x not in self._forms}
    beside_products = {path: x for path, x in stored.items() if x is not None}
    return beside_products | self._base.beside(others, resolve)

  def _beside_product(
    self, target: np.ndarray, form: products.Form, paths: tuple[str, ...]
  ) -> base_lib.Beside | None:
    """Returns how to store a tensor beside its product; None if it is not worth it."""
    segments, arrays = [*map(self.segment, form.segments)], self._arrays(paths)
    bases = [x.numbers for x in segments if x is not None]
    if arrays is None or len(bases) < len(segments):
      return None
    target, dense = host.contiguous(target), [x for x, _ in arrays]
    is_rounded = self._is_rounded and form.kind != 'shortcut'
    form = msgspec.structs.replace(form, rounded=is_rounded)
    product = form.tensor(dense, bases, target.shape, target.dtype)
    roundoff = self._context._replace(dtype=target.dtype).roundoff
    pair = fit.Pair(form, dense, target)
    if not self._keeps_bits and pair.is_rounded(product, roundoff):
      target = product
    known = products.Product(
      **msgspec.structs.asdict(form), arrays=tuple(x for _, x in arrays)
    )
    return base_lib.beside_known(target, product, known)


def _times(
  array: Any, rows: np.ndarray | None, columns: np.ndarray | None
) -> np.ndarray:
  """Returns `rows^T @ array @ columns` in float32, by NumPy: it compiles no program."""
  product = np.asarray(array, np.float32)
  if rows is not None:
    product = rows.T.astype(np.float32) @ product
  return product if columns is None else product @ columns.astype(np.float32)


def _segments(config: models.ModelConfig) -> dict[str, tuple[int | None, ...]]:
  """Returns the segments of the rows and the columns of parameters, by path."""
  step = config.segments_per_layer
  layer, outer = models.layout.layer_axes(config), models.layout.outer_axes(config)
  parts = [('', outer, 0, config.num_layers * step)]
  for i in range(config.num_layers):
    parts.append((models.names.prefix(i), layer, i * step, (i + 1) * step))
  return {
    f'{prefix}{path}': tuple(
      axis if axis is None else first + axis if axis >= 0 else last
      for axis in rotations.sides(axes[path])
    )
    for prefix, axes, first, last in parts
    for path in axes
  }


def _forms(
  dense: models.ModelConfig, sliced: models.ModelConfig
) -> dict[str, tuple[products.Form, tuple[str, ...]]]:
  """Returns the forms of parameters by path, and the paths of tensors of the base."""
  sides, known, has_mean = (
    _segments(sliced),
    _segments(dense),
    dense.norm == 'layernorm',
  )
  forms: dict[str, tuple[products.Form, tuple[str, ...]]] = {}
  for path, (rows, columns) in sides.items():
    prefix = models.names.prefix(models.names.layer_index(path))
    group = path.removeprefix(prefix).partition('/')[0]
    norm = prefix + models.layout.norm_of(dense, group) if prefix else 'final_norm'
    kernel = f'{path.rpartition("/")[0]}/kernel'
    is_tied = group == 'head' and dense.tied_head
    source = 'embed/tokens' if is_tied else kernel
    paths: tuple[str, ...] = ()
    if rows is not None and columns is not None:
      form = products.Form(kind='shortcut', segments=(rows, columns))
    elif columns is not None:
      form = products.Form(kind='writes', segments=(columns,), centred=has_mean)
      paths = (path,)
    elif rows is not None:
      form = products.Form(kind='reads', segments=(rows,), transposed=is_tied)
      paths = source, f'{norm}/scale'
    elif has_mean and sides.get(kernel, (None,))[0] is not None:
      form = products.Form(kind='bias', transposed=is_tied)
      paths = source, f'{norm}/bias', *([path] if path in known else [])
    else:
      continue
    forms[path] = form, paths
  return forms


def suits(source: Any, base: base_lib.Base) -> bool:
  """Returns whether a model may be sliced from a base, by their configs."""
  sliced, dense = source.config, base.config
  if sliced is None or dense is None or not sliced.sliced or dense.sliced:
    return False
  try:
    return bool(dense.sliced_to(sliced.segment_widths) == sliced)
  except ValueError:  # another number of segments
    return False
