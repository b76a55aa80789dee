"""Linear layers that a checkpoint stores as two factors, `weight = left @ right`.

Compression by singular values puts two linear layers where there was one, and an
adapter two beside one. To add a method, add how it names them to `FACTORS`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import structured
from rotbits_jax.checkpoints import errors


class FactorNames(NamedTuple):
  """How the tensors of a linear layer are named; `{}` stands for the layer's name.

  Attributes:
    left: the factor `[out, r]`.
    right: the factor `[r, in]`.
    bias: the bias, `[out]`.
    drops: what the layer's name loses at its end, if it is there.
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
  # Hugging Face's PEFT. An adapter's pair does not stand for the weight that it has the
  # name of, but for what is added to it.
  'lora': FactorNames('{}.lora_B.weight', '{}.lora_A.weight', '{}.lora_B.bias'),
}
"""The namings that are known; `structured.FactorPair.names` is one of the keys."""


class Factored(NamedTuple):
  """How a weight is stored as two factors.

  Attributes:
    rank: r, the width between the factors.
    names: a key of `FACTORS`.
  """

  rank: int
  names: str


_WEIGHTS = tuple(row for row in FACTORS if row != 'lora')


def join(
  tensors: Mapping[str, Any],
  weights: Iterable[str],
  rows: tuple[str, ...] = _WEIGHTS,
) -> dict[str, Any]:
  """Puts one leaf where a weight's two factors are among the tensors.

  Args:
    tensors: arrays, or descriptions of arrays such as `lazy.LazyTensor`, by the names
      that they have in the checkpoint.
    weights: names of weights, `<layer>.weight`, that may be stored as factors.
    rows: which of `FACTORS` they may be named by.

  Returns:
    The tensors; a `structured.LowRank` `[out, in]` has the name of the weight, and the
    layer's bias the name that it has beside a weight.

  Raises:
    CheckpointError: if two factors do not have one rank and one dtype.
  """
  joined = dict(tensors)
  for weight in weights:
    for row in rows:
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
  """The inverse of `join`, up to the basis between two factors.

  Args:
    tensors: arrays and unstacked `structured.FactorPair` leaves by name; or
      descriptions of arrays and `structured.LowRank` leaves of these.

  Returns:
    The tensors; factors have the leaf's dtype.
  """
  found = dict(tensors)
  for weight, leaf in tensors.items():
    if isinstance(leaf, structured.FactorPair):
      names = _names(leaf.names, weight)
      pair = leaf if isinstance(leaf, structured.LowRank) else leaf.plain()
      del found[weight]
      if _bias(weight) in found:
        found[names.bias] = found.pop(_bias(weight))
      found |= {names.left: pair.u, names.right: pair.v}
  return found


def join_adapter(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The pairs of a LoRA adapter, `lora_B @ lora_A`.

  Args:
    tensors: the content of PEFT's `adapter_model.safetensors`.

  Returns:
    A `structured.LowRank` `[out, in]` by the name of each weight that the adapter adds
    a multiple of it to, and the other tensors; `split` is the inverse.

  Raises:
    CheckpointError: see `join`.
  """
  suffix = FACTORS['lora'].left.removeprefix('{}')
  layers = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
  return join(tensors, [f'{layer}.weight' for layer in layers], ('lora',))


def _names(row: str, weight: str) -> FactorNames:
  """The names in a row of `FACTORS`, filled in."""
  names = FACTORS[row]
  layer = weight.removesuffix('.weight').removesuffix(names.drops)
  return FactorNames(*(name.format(layer) for name in names))


def _bias(weight: str) -> str:
  return weight.removesuffix('.weight') + '.bias'
