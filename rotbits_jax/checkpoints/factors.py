"""Linear layers that a checkpoint stores as two factors, `weight = left @ right`.

Compression by singular values replaces a linear layer by two smaller ones. To support
another method, add the names of its tensors to `FACTORS`.

Shape letters: a weight is `[out, in]`, and its rank r is the width between the factors.
"""

from collections.abc import Mapping
from typing import NamedTuple

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy


class FactorNames(NamedTuple):
  """Name templates for the tensors of a factored linear layer.

  `{}` stands for the name of the layer, without the suffix `drops`.

  Attributes:
    left: name of the factor `[out, r]`.
    right: name of the factor `[r, in]`.
    bias: name of the bias, `[out]`.
    drops: suffix that is removed from the layer's name, if it is there.
  """

  left: str
  right: str
  bias: str
  drops: str = ''


FACTORS = {
  # Wang et al., SVD-LLM, arXiv 2403.07378: q_proj becomes q_u_proj and q_v_proj.
  'svd_llm': FactorNames(
    '{}_u_proj.weight', '{}_v_proj.weight', '{}_u_proj.bias', drops='_proj'
  ),
  # Yuan et al., ASVD, arXiv 2312.05821.
  'asvd': FactorNames('{}.ALinear.weight', '{}.BLinear.weight', '{}.ALinear.bias'),
  'linears': FactorNames('{}.U.weight', '{}.V.weight', '{}.U.bias'),
  'factors': FactorNames('{}.U', '{}.V', '{}.bias'),
}
"""The known naming schemes; `structured.FactorPair.names` is one of the keys."""


class Factored(NamedTuple):
  """How a weight is stored as two factors.

  Attributes:
    rank: r, the width between the factors.
    names: a key of `FACTORS`.
  """

  rank: int
  names: str

  def names_of(self, weight: str) -> FactorNames:
    """Returns the names of the factors of a weight, `<layer>.weight`."""
    row = FACTORS[self.names]
    layer = weight.removesuffix('.weight').removesuffix(row.drops)
    return FactorNames(*(name.format(layer) for name in row))


def find(tensors: Mapping[str, lazy.TensorSpec], weight: str) -> Factored | None:
  """Returns how a weight is stored as two factors; None if it is not.

  Raises:
    CheckpointError: if the factors differ in rank or dtype.
  """
  for row in FACTORS if weight not in tensors else ():
    names = Factored(0, row).names_of(weight)
    left, right = tensors.get(names.left), tensors.get(names.right)
    if left is None or right is None:
      continue
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
      raise errors.CheckpointError(
        f'{names.left} and {names.right} must be [out, r] and [r, in], '
        f'got {left.shape} and {right.shape}'
      )
    if left.dtype != right.dtype:
      raise errors.CheckpointError(
        f'{names.right} must be {left.dtype} like {names.left}, got {right.dtype}'
      )
    return Factored(left.shape[1], row)
  return None
