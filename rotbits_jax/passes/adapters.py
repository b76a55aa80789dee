"""Takes adapters to the coordinates that a chain of transforms chooses.

An adapter adds `u v` to a kernel. A transform multiplies a kernel by matrices that do
not depend on the adapter: rotations, scales of norms, gauges of heads. So the factors
go through the chain beside their kernel, `u` with its rows and `v` with its columns.
The kernels themselves are rewritten once more for that, and then dropped.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import rewrite
from rotbits_jax.passes import transform

_OUT = models.layout.adapter_of('attention/out/kernel')


def carry(
  context: transform.Context,
  chain: transform.Chain,
  factors: Mapping[str, structured.LowRank],
) -> dict[str, structured.LowRank]:
  """Returns the factors of an adapter in the coordinates that a chain chooses.

  Args:
    context: the context in which the chain rewrites the model.
    chain: the transforms.
    factors: the factors by path, see `models.layout.adapter_of`.

  Returns:
    The factors in their old dtypes.

  Raises:
    ValueError: if an adapter has no counterpart there. It names the kernel, or the
      transform that carries none.
  """
  for one in chain.transforms:
    if not one.carries_adapters:
      raise ValueError(f'the adapter cannot be carried: {one.name!r} carries none')
  config = context.config
  if (
    config.qkv_bias and config.out_bias and any(path.endswith(_OUT) for path in factors)
  ):
    raise ValueError(
      'the adapter cannot be carried: it changes attention/out, which also multiplies '
      'the bias of the values'
    )
  dtypes = {path: np.dtype(pair.dtype) for path, pair in factors.items()}
  adapted = context._replace(
    source=_Adapted(context.source, factors),
    dtypes={**context.dtypes, **dtypes},
    mesh=None,
  )
  found: dict[str, structured.LowRank] = {}
  for records, _ in rewrite.rewrite(adapted, chain):
    for record in records:
      flat = structured.flatten(record.params)
      found |= {path: x for path, x in flat.items() if path in factors}
  for path, pair in found.items():
    if not all(np.isfinite(np.float32(x)).all() for x in (pair.u, pair.v)):
      raise ValueError(
        f'{path}: the adapter cannot be carried: a head has no inverse that is '
        'accurate enough, or numbers of the adapter would be too large'
      )
  return found


class _Adapted:
  """A `transform.ModelSource` with adapters beside the kernels."""

  def __init__(
    self, source: transform.ModelSource, factors: Mapping[str, structured.LowRank]
  ):
    self._source, self._factors = source, factors
    self.config, self.records = source.config, source.records

  def read(self, record: str) -> models.Params:
    return self._with_factors(self._source.read(record))

  def specs(self, record: str) -> models.Params:
    return self._with_factors(self._source.specs(record))

  def outer(self) -> models.Params:
    return self._with_factors(self._source.outer())

  def _with_factors(self, params: models.Params) -> models.Params:
    flat: dict[str, Any] = structured.flatten(params)
    beside = {path: models.layout.adapter_of(path) for path in flat}
    for path, own in beside.items():
      if (pair := self._factors.get(own)) is not None and path != own:
        flat[own] = pair
    return structured.unflatten(flat)
