"""The program behind demo.sh."""

import pytest
import word_checkpoints

from benchmarks import demo
from benchmarks import results
import rotbits_jax


class TestDemo:
  @pytest.mark.slow
  def test_measures_each_preset(self, tmp_path):
    source = word_checkpoints.copy_with_tokenizer(
      'llama-tiny-sliced-head-0.25', tmp_path
    )
    (weights,) = source.glob('*.pt')
    text = word_checkpoints.random_text(40)
    subject = demo.Subject('sliced 25%', rotbits_jax.load_checkpoint(weights), weights)
    rows = demo.measure(subject, text, tmp_path, max_tokens=32)
    given, raw, *presets, rerounded = rows
    assert given.bytes == weights.stat().st_size
    assert raw.bytes < given.bytes  # the .pt holds what slicing cut off
    assert [row.name for row in presets] == list(rotbits_jax.PRESETS)
    for row in presets:
      path = demo.encoded_path('sliced 25%', row.name, tmp_path)
      assert path.name == f'sliced-25-{row.name}.rotbits'
      assert row.bytes == path.stat().st_size
      assert row.bytes < raw.bytes
      change = 1e-2 if row.name == 'near' else 1e-3
      assert abs(row.perplexity / raw.perplexity - 1) < change
    by_name = {row.name: row for row in presets}
    assert by_name['exact'].kl == 0
    assert by_name['free'].kl <= 2 * rerounded.kl
    assert by_name['near'].bytes < by_name['free'].bytes < by_name['exact'].bytes

  def test_its_checkpoint_is_there(self):
    assert demo.WEIGHTS.is_file()

  def test_dense_models_have_no_published_scheme(self):
    config = rotbits_jax.open_checkpoint(demo.WEIGHTS).config
    assert demo.presets_for(config) == list(rotbits_jax.PRESETS)
    dense = rotbits_jax.open_checkpoint(demo.WEIGHTS.parents[1] / 'llama-tiny-dense')
    missing = set(rotbits_jax.PRESETS) - set(demo.presets_for(dense.config))
    assert missing == {'paper'}


ROWS = [
  demo.Row('dense', demo.TENSORS, 1000, 20.0, 0.0),
  demo.Row('dense', 'exact', 700, 20.0, 0.0),
  demo.Row('sliced', 'as given, .pt', 1500),
  demo.Row('sliced', demo.TENSORS, 1250, 60.0, 0.0),
  demo.Row('sliced', 'free', 750, 60.001, 1.3e-6, None, 12.34, 0.5),
  demo.Row('sliced', 'exact', 900, 60.0, 0.0),
  demo.Row('sliced', demo.REROUNDED, None, 60.002, 1e-6),
]


class TestTable:
  def test_rows(self):
    lines = demo.to_text(ROWS).splitlines()
    assert lines[0].split()[:4] == ['bytes', 'of', 'tensors', 'perplexity']
    assert 'truth' not in lines[0]
    assert lines[3].split() == ['sliced', 'as', 'given,', '.pt', '1,500', '120.0%']
    assert lines[5].split() == [
      *('free', '750', '60.0%', '60.001', '1.3e-06', '12.3', '0.5')
    ]
    assert lines[7].split() == ['rotated,', 'rounded', 'again', '60.002', '1e-06']
    assert len({len(lines[0]), len(lines[5])}) == 1
    truth = [*ROWS, ROWS[4]._replace(kl_truth=3e-6)]
    assert 'KL to truth' in demo.to_text(truth)

  def test_verdict(self):
    said = demo.verdict(ROWS)
    assert '750 bytes at perplexity 60.0' in said
    assert '700 bytes at 20.0' in said
    assert demo.verdict(ROWS[2:]) is None
    assert demo.verdict([*ROWS[:1], ROWS[1]._replace(bytes=800), *ROWS[2:]]) is None


class TestResults:
  def test_random_weights_are_refused(self):
    rows = [demo.Row('random', demo.TENSORS, 1, 4000.0)]
    with pytest.raises(ValueError, match='no model of text'):
      results.small_section(rows, 'a text')
