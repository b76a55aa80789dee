"""What each way to store a sliced model comes to, from shapes alone.

Counts the numbers that every scheme stores, in the convention of *Getting Free Bits
Back from Rotational Symmetries in LLMs* (arXiv 2410.01309), so that they compare with
its table:

  - The reduction is against the dense model as SliceGPT (arXiv 2401.15024) counts it,
    after the norms are fused: norms have no parameters, the head is untied, and where
    LayerNorm was, it has a bias. The other biases and the positions count.
  - Every number takes 16 bits; nothing is entropy coded.
  - The width is `int((1 - sparsity) D)`, rounded down to a multiple of 8. The head is
    not sliced: the last shortcut is `[d, D]`, and the last layer writes D numbers.

With S shortcuts, and `m = D - d`, the schemes store, in numbers:

  SliceGPT         its checkpoint
  ideal bits-back  `S d(d-1)/2` fewer: a rotation for each sliced segment; the last
                   segment, which is not sliced, gives none
  gauge-fixed      `d k - k(k-1)/2` with `k = min(m, d)`, for B of `I - B B^T`, in place
                   of each shortcut's `d^2`; nothing for the last one, which becomes
                   `[I 0]`; and the global gauge, `d(d-1)/2` fewer
  + heads          `h^2` fewer a key-value head by GL(h) between value and output, and
                   `r + (h - r)^2` between query and key, of which RoPE turns r
  + retied         `T` `[D, d]` in place of the embedding `[V, d]`, where the dense
                   model's head was tied to it
"""

import itertools
from typing import NamedTuple

from rotbits_jax import models
from rotbits_jax import slicing


class Accounting(NamedTuple):
  """Numbers that each scheme stores; the module's docstring defines them.

  Attributes:
    width: d, of the sliced segments.
    dense: of the dense model, norms fused and head untied.
    slicegpt: of the sliced checkpoint.
    bits_back_ideal: if bits-back coding got all the bits of every rotation.
    gauge_fixed: with the residual gauge fixed and shortcuts as `I - B B^T`.
    gauge_fixed_heads: with the attention heads' gauges fixed too.
    gauge_fixed_heads_retied: with the embedding made from the head too; None if they
      were not tied.
  """

  width: int
  dense: int
  slicegpt: int
  bits_back_ideal: int
  gauge_fixed: int
  gauge_fixed_heads: int
  gauge_fixed_heads_retied: int | None

  def numbers(self) -> dict[str, int | None]:
    """The numbers by scheme, the dense model's first."""
    return {name: n for name, n in self._asdict().items() if name != 'width'}

  def reduction(self) -> dict[str, float | None]:
    """By how many percent each scheme stores less than the dense model."""
    percent = lambda n: None if n is None else 100 * (1 - n / self.dense)
    return {name: percent(n) for name, n in self.numbers().items() if name != 'dense'}


def accounting(
  config: models.ModelConfig, sparsity: float, *, round_interval: int = 8
) -> Accounting:
  """Counts what a model takes once it is sliced, under each scheme.

  Args:
    config: of the dense model.
    sparsity: the part of the hidden size that slicing removes, in [0, 1).
    round_interval: the sliced width is a multiple of it.

  Returns:
    The counts.

  Raises:
    ValueError: if the config is of a sliced model, a setting is out of range, or no
      width is left.
  """
  if config.sliced:
    raise ValueError(f'the accounting begins with a dense model, got {config.norm=}')
  hidden = config.hidden_size
  width = slicing.sliced_width(hidden, sparsity, round_interval)
  segments = len(config.segment_widths) - 1
  unsliced = config.sliced_to((hidden,) * (segments + 1))
  sliced = config.sliced_to((width,) * segments + (hidden,))
  rotation = width * (width - 1) // 2
  slicegpt = models.count_numbers(sliced)

  rank = min(hidden - width, width)
  factors = (segments - 1) * (width * rank - rank * (rank - 1) // 2)
  gauge_fixed = slicegpt - _shortcut_numbers(sliced) + factors - rotation

  turned, still = config.rotary_dim, config.head_dim - config.rotary_dim
  head_gauge = config.head_dim**2 + turned + still**2
  heads = gauge_fixed - config.num_layers * config.num_kv_heads * head_gauge
  retied = heads - (config.vocab_size - hidden) * width
  return Accounting(
    width=width,
    dense=models.count_numbers(unsliced) - _shortcut_numbers(unsliced),
    slicegpt=slicegpt,
    bits_back_ideal=slicegpt - segments * rotation,
    gauge_fixed=gauge_fixed,
    gauge_fixed_heads=heads,
    gauge_fixed_heads_retied=retied if config.tied_head else None,
  )


def _shortcut_numbers(config: models.ModelConfig) -> int:
  return sum(a * b for a, b in itertools.pairwise(config.segment_widths))
