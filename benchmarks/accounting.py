"""Counts the elements that each scheme stores for a sliced model, from shapes alone.

The models and the published figures are those of `configs/published.py`. The counts
follow the conventions of *Getting Free Bits Back from Rotational Symmetries in LLMs*
(arXiv 2410.01309). Every element takes 16 bits. The width is `int((1 - sparsity) D)`,
rounded down to a multiple of 8; the last segment is not sliced. The dense model is
counted as by SliceGPT (arXiv 2401.15024), after norm fusion: norms have no parameters,
and the head is untied, with a bias if the model had LayerNorm. Other biases and the
position table count.

With S shortcuts and `m = D - d`, the schemes store the following:

  SliceGPT         SliceGPT's checkpoint.
  ideal bits-back  `S d(d-1)/2` elements fewer: a rotation for each sliced segment. The
                   last segment, which is not sliced, saves nothing.
  gauge-fixed      For each shortcut `[d, d]`, the matrix B of `I - B B^T`, which is
                   `d k - k(k-1)/2` elements with `k = min(m, d)`. Nothing for the last
                   shortcut, because it becomes `[I 0]`. The remaining global rotation
                   saves `d(d-1)/2` elements.
  + heads          For each key-value head, `h^2` elements fewer, because GL(h) acts
                   between value and output, and `r + (h - r)^2` elements fewer between
                   query and key, where RoPE rotates r elements of a head. The latter
                   are not saved in a model that norms queries and keys.
  + retied         A matrix T `[D, d]` in place of the embedding `[V, d]`, if the head
                   of the dense model is tied to the embedding.
"""

from collections.abc import Iterator
import itertools
from typing import NamedTuple

from benchmarks import common
from configs import published
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import slicing

TITLE = 'Sizes of sliced models, from shapes alone'
HEADER = ('model', 'sliced', 'SliceGPT', 'published', 'ideal', 'gauge', 'heads', 'tied')


class Accounting(NamedTuple):
  """The elements that each scheme stores; the module docstring defines them."""

  width: int  # d, the width of the sliced segments
  dense: int  # with fused norms and an untied head
  slicegpt: int
  bits_back_ideal: int
  gauge_fixed: int
  gauge_fixed_heads: int
  gauge_fixed_heads_retied: int | None  # None if the dense model's head is not tied

  def elements(self) -> dict[str, int | None]:
    """Returns the counts by scheme; that of the dense model comes first."""
    return {name: n for name, n in self._asdict().items() if name != 'width'}

  def reduction(self) -> dict[str, float | None]:
    """Returns by how many percent each scheme's count is below the dense model's."""
    percent = lambda n: None if n is None else 100 * (1 - n / self.dense)
    return {name: percent(n) for name, n in self.elements().items() if name != 'dense'}


def accounting(config: models.ModelConfig, sparsity: float) -> Accounting:
  """Counts the elements that each scheme stores for a dense model after slicing."""
  if config.sliced:
    raise ValueError(f'the accounting needs a dense model, got {config.norm=}')
  hidden = config.hidden_size
  width = slicing.sliced_width(hidden, sparsity)
  segments = len(config.segment_widths) - 1
  sliced = config.sliced_to((width,) * segments + (hidden,))
  unsliced = config.sliced_to(config.segment_widths)
  rotation = width * (width - 1) // 2
  slicegpt = models.count_elements(sliced)

  rank = min(hidden - width, width)
  factors = (segments - 1) * (width * rank - rank * (rank - 1) // 2)
  gauge_fixed = slicegpt - _shortcut_elements(sliced) + factors - rotation

  valid, turned = models.layout.symmetries(sliced), config.rotary_dim
  queries = turned + (config.head_dim - turned) ** 2
  head_gauge = config.num_layers * (config.head_dim**2 + valid.queries * queries)
  heads = gauge_fixed - config.num_kv_heads * head_gauge
  retied = heads - (config.vocab_size - hidden) * width
  return Accounting(
    width=width,
    dense=models.count_elements(unsliced) - _shortcut_elements(unsliced),
    slicegpt=slicegpt,
    bits_back_ideal=slicegpt - segments * rotation,
    gauge_fixed=gauge_fixed,
    gauge_fixed_heads=heads,
    gauge_fixed_heads_retied=retied if config.tied_head else None,
  )


def _shortcut_elements(config: models.ModelConfig) -> int:
  """Counts the elements of all shortcuts."""
  return sum(a * b for a, b in itertools.pairwise(config.segment_widths))


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  rows = []
  for name, config_json in published.MODELS.items():
    config = checkpoints.parse_config(config_json)
    stated = published.REDUCTIONS.get(name, (None,) * len(published.SPARSITIES))
    for sparsity, percent in zip(published.SPARSITIES, stated, strict=True):
      slicegpt, *ours = accounting(config, sparsity).reduction().values()
      percents = slicegpt, percent, *ours
      cells = (None if x is None else f'{x:.2f}%' for x in percents)
      rows.append((name, f'{sparsity:.0%}', *cells))
  about = (
    'Fewer elements than the dense model with an untied head, without coding. The '
    'ideal scheme loses no bits of a rotation; the last columns add up, as in `free`.'
  )
  yield common.Section(TITLE, f'{about}\n\n{common.table(HEADER, rows)}')
