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
  lines = []
  for name, config_json in published.MODELS.items():
    config = checkpoints.parse_config(config_json)
    for i, sparsity in enumerate(published.SPARSITIES):
      reduction = accounting.accounting(config, sparsity).reduction()
      reduction['published'] = dict(enumerate(published.REDUCTIONS.get(name, ()))).get(
        i
      )
      columns = ('slicegpt', 'published', 'bits_back_ideal', 'gauge_fixed')
      columns += ('gauge_fixed_heads', 'gauge_fixed_heads_retied')
      percents = (reduction[column] for column in columns)
      cells = ('' if x is None else f'{x:.2f}%' for x in percents)
      lines.append((name, f'{sparsity:.0%}', *cells))
  about = 'Fewer elements than the dense model with an untied head, without coding.'
  body = f'{about}\n\n{common.table(HEADER, lines, texts=1)}'
  yield common.Section(TITLE, body)
