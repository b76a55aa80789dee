"""The quantised types of GGUF, and the fields of their blocks.

A block of the simple types is a float16 scale, perhaps a float16 offset, and the codes.
A block of the K types is a super-block: float16 units, integer scales and offsets of
smaller blocks, and the codes. `structured.Quantized` has the formula.

Reference: ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import structured


class BlockFields(NamedTuple):
  """The fields of `structured.Quantized` for n blocks, `[n, ...]`."""

  codes: np.ndarray
  scales: np.ndarray
  offsets: np.ndarray | None = None
  scale_units: np.ndarray | None = None
  offset_units: np.ndarray | None = None


class Type(NamedTuple):
  """A quantised type.

  Attributes:
    elements: elements of a block.
    nbytes: bytes of a block.
    split: function that divides the bytes of blocks, uint8 `[n, nbytes]`.
  """

  elements: int
  nbytes: int
  split: Callable[[np.ndarray], BlockFields]


def quantized(
  block: Type, data: np.ndarray, shape: tuple[int, int], dtype: np.dtype
) -> structured.Quantized:
  """Returns the leaf of a matrix.

  Args:
    block: the type of the blocks.
    data: the bytes of the blocks, row after row.
    shape: shape of the matrix.
    dtype: dtype of the array that the leaf stands for.
  """
  parts = block.split(data.reshape(-1, block.nbytes))
  rows = lambda x: None if x is None else x.reshape(shape[0], -1)
  fields: dict[str, Any] = dict(zip(BlockFields._fields, map(rows, parts), strict=True))
  return structured.Quantized(**fields | {'name': dtype.name})


def _columns(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
  """Divides the bytes of blocks into parts of these sizes."""
  return np.split(blocks, np.cumsum(sizes)[:-1], axis=1)


def _halves(data: np.ndarray) -> np.ndarray:
  """Returns the float16 number in two bytes of each block, `[n, 1]`."""
  return np.ascontiguousarray(data).view(np.float16)


def _unpack(data: np.ndarray, bits: int, group: int) -> np.ndarray:
  """Returns the integers in groups of bytes: first the low bits of all of a group."""
  shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
  parts = data.reshape(len(data), -1, 1, group) >> shifts
  return (parts & np.uint8((1 << bits) - 1)).reshape(len(data), -1)


def _signed(codes: np.ndarray, zero: int) -> np.ndarray:
  return codes.astype(np.int8) - np.int8(zero)


def _q4_0(blocks: np.ndarray) -> BlockFields:
  scale, codes = _columns(blocks, 2, 16)
  return BlockFields(_signed(_unpack(codes, 4, 16), 8), _halves(scale))


def _q4_1(blocks: np.ndarray) -> BlockFields:
  scale, offset, codes = _columns(blocks, 2, 2, 16)
  return BlockFields(_unpack(codes, 4, 16), _halves(scale), _halves(offset))


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
  top = np.unpackbits(high, axis=1, bitorder='little')
  return _unpack(low, 4, 16) | top << np.uint8(4)


def _q5_0(blocks: np.ndarray) -> BlockFields:
  scale, high, low = _columns(blocks, 2, 4, 16)
  return BlockFields(_signed(_five_bits(high, low), 16), _halves(scale))


def _q5_1(blocks: np.ndarray) -> BlockFields:
  scale, offset, high, low = _columns(blocks, 2, 2, 4, 16)
  return BlockFields(_five_bits(high, low), _halves(scale), _halves(offset))


def _q8_0(blocks: np.ndarray) -> BlockFields:
  scale, codes = _columns(blocks, 2, 32)
  return BlockFields(np.ascontiguousarray(codes).view(np.int8), _halves(scale))


def _q2_k(blocks: np.ndarray) -> BlockFields:
  both, codes, unit, least = _columns(blocks, 16, 64, 2, 2)
  scales, offsets = both & np.uint8(15), both >> np.uint8(4)
  return BlockFields(
    _unpack(codes, 2, 32), scales, offsets, _halves(unit), -_halves(least)
  )


def _q3_k(blocks: np.ndarray) -> BlockFields:
  high, low, low_scales, high_scales, unit = _columns(blocks, 32, 64, 8, 4, 2)
  codes = _unpack(low, 2, 32) | _unpack(high, 1, 32) << np.uint8(2)
  scales = _unpack(low_scales, 4, 8) | _unpack(high_scales, 2, 4) << np.uint8(4)
  return BlockFields(_signed(codes, 4), _signed(scales, 32), scale_units=_halves(unit))


def _six_bits(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the 8 scales and the 8 offsets of Q4_K and Q5_K, of 6 bits each."""
  scales, offsets, both = _columns(data, 4, 4, 4)
  low, top = np.uint8(0x3F), np.uint8(0x30)
  more_scales = (both & np.uint8(15)) | (scales >> np.uint8(2) & top)
  more_offsets = (both >> np.uint8(4)) | (offsets >> np.uint8(2) & top)
  return (
    np.concatenate([scales & low, more_scales], axis=1),
    np.concatenate([offsets & low, more_offsets], axis=1),
  )


def _q4_k(blocks: np.ndarray) -> BlockFields:
  unit, least, both, codes = _columns(blocks, 2, 2, 12, 128)
  units = _halves(unit), -_halves(least)
  return BlockFields(_unpack(codes, 4, 32), *_six_bits(both), *units)


def _q5_k(blocks: np.ndarray) -> BlockFields:
  unit, least, both, high, low = _columns(blocks, 2, 2, 12, 32, 128)
  codes = _unpack(low, 4, 32) | _unpack(high, 1, 32) << np.uint8(4)
  return BlockFields(codes, *_six_bits(both), _halves(unit), -_halves(least))


def _q6_k(blocks: np.ndarray) -> BlockFields:
  low, high, scales, unit = _columns(blocks, 128, 64, 16, 2)
  codes = _unpack(low, 4, 64) | _unpack(high, 2, 32) << np.uint8(4)
  scales = np.ascontiguousarray(scales).view(np.int8)
  return BlockFields(_signed(codes, 32), scales, scale_units=_halves(unit))


TYPES: dict[int, Type] = {
  2: Type(32, 18, _q4_0),
  3: Type(32, 20, _q4_1),
  6: Type(32, 22, _q5_0),
  7: Type(32, 24, _q5_1),
  8: Type(32, 34, _q8_0),
  10: Type(256, 84, _q2_k),
  11: Type(256, 110, _q3_k),
  12: Type(256, 144, _q4_k),
  13: Type(256, 176, _q5_k),
  14: Type(256, 210, _q6_k),
}
"""The types that are kept as codes, by their numbers in the file."""
