"""Counts what each scheme removes of sliced models, from their sizes alone.

The models and the published figures are those of `configs/published.py`.
"""

from collections.abc import Iterator

from benchmarks import common
from configs import published
from rotbits_jax import checkpoints
from rotbits_jax.evaluation import accounting

TITLE = 'Sizes of sliced models, from shapes alone'
HEADER = ('model', 'sliced', 'SliceGPT', 'published', 'ideal', 'gauge', 'heads', 'tied')


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  rows = []
  for name, config_json in published.MODELS.items():
    config = checkpoints.parse_config(config_json)
    stated = published.REDUCTIONS.get(name, (None,) * len(published.SPARSITIES))
    for sparsity, percent in zip(published.SPARSITIES, stated, strict=True):
      slicegpt, *ours = accounting.accounting(config, sparsity).reduction().values()
      percents = slicegpt, percent, *ours
      cells = (None if x is None else f'{x:.2f}%' for x in percents)
      rows.append((name, f'{sparsity:.0%}', *cells))
  about = (
    'Fewer elements than the dense model with an untied head, without coding. The '
    'ideal scheme loses none of the bits of a rotation.'
  )
  yield common.Section(TITLE, f'{about}\n\n{common.table(HEADER, rows)}')
