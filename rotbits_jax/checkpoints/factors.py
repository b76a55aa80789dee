"""Linear layers that a checkpoint stores as two factors, `weight = left @ right`.

Compression by singular values replaces a linear layer by two smaller ones. To support
another method, add the names of its tensors to `FACTORS`.

Shape letters: a weight is `[out, in]`, and its rank r is the width between the factors.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rotbits_jax import structured
from rotbits_jax.checkpoints import errors


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


def join(tensors: Mapping[str, Any], weights: Iterable[str]) -> dict[str, Any]:
  """Replaces the two factors of a weight by one `structured.LowRank` leaf.

  Args:
    tensors: arrays, or descriptions of arrays such as `lazy.LazyTensor`, by their names
      in the checkpoint.
    weights: names of weights, `<layer>.weight`, that may be stored as factors.

  Returns:
    The tensors. A leaf `[out, in]` has the name `<layer>.weight`, and the bias of its
    layer has the name `<layer>.bias`.

  Raises:
    CheckpointError: if two factors differ in rank or dtype.
  """
  joined = dict(tensors)
  for weight in weights:
    for row in FACTORS:
      names = _names(row, weight)
      if weight in joined or names.left not in joined or names.right not in joined:
        continue
      left, right = joined.pop(names.left), joined.pop(names.right)
      if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise errors.CheckpointError(
          f'{names.left} and {names.right} must be [out, r] and [r, in], '
          f'got {left.shape} and {right.shape}'
        )
      if left.dtype != right.dtype:
        raise errors.CheckpointError(
          f'{names.right} must be {left.dtype} like {names.left}, got {right.dtype}'
        )
      joined[weight] = structured.LowRank(left, right, names=row)
      if names.bias in joined:
        joined[_bias(weight)] = joined.pop(names.bias)
  return joined


def split(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Replaces leaves by their two factors: the inverse of `join`.

  The factors may differ from the original ones by the choice of a basis between them;
  their product is the same.

  Args:
    tensors: arrays and unstacked `structured.FactorPair` leaves by name; or
      descriptions of arrays, and `structured.LowRank` leaves of such descriptions.

  Returns:
    The tensors; factors have the leaf's dtype.
  """
  found = dict(tensors)
  for weight, leaf in tensors.items():
    pair = structured.pair(leaf)
    if pair is not None:
      names = _names(pair.names, weight)
      del found[weight]
      if _bias(weight) in found:
        found[names.bias] = found.pop(_bias(weight))
      found |= {names.left: pair.u, names.right: pair.v}
  return found


def _names(row: str, weight: str) -> FactorNames:
  """Returns the names in a row of `FACTORS` for the layer of a weight."""
  names = FACTORS[row]
  layer = weight.removesuffix('.weight').removesuffix(names.drops)
  return FactorNames(*(name.format(layer) for name in names))


def _bias(weight: str) -> str:
  return weight.removesuffix('.weight') + '.bias'
