"""The program behind demo.sh."""

import pytest
import word_checkpoints

from benchmarks import demo
import rotbits_jax


class TestDemo:
  @pytest.mark.slow
  def test_measures_each_preset(self, tmp_path):
    source = word_checkpoints.copy_with_tokenizer(
      'llama-tiny-sliced-head-0.25', tmp_path
    )
    (weights,) = source.glob('*.pt')
    text = word_checkpoints.random_text(40)
    sliced = demo.Sliced(rotbits_jax.load_checkpoint(weights), weights)
    rows = demo.measure(sliced, text, tmp_path, max_tokens=32)
    raw, file, *presets, rerounded = rows
    assert file.bytes == weights.stat().st_size
    assert raw.bytes < file.bytes  # the .pt also holds the parts that slicing cut off
    assert [row.name for row in presets] == list(rotbits_jax.PRESETS)
    for row in presets:
      assert row.bytes == (tmp_path / f'{row.name}.rotbits').stat().st_size
      assert row.bytes < raw.bytes
      assert abs(row.perplexity / raw.perplexity - 1) < 1e-3
      assert row.kl <= 2 * rerounded.kl
    by_name = {row.name: row for row in presets}
    assert by_name['exact'].kl == 0
    assert by_name['free'].bytes < by_name['exact'].bytes

  def test_its_checkpoint_is_there(self):
    assert demo.WEIGHTS.is_file()

  def test_table(self):
    rows = [
      demo.Row(demo.RAW, 1000, 20.0, 0.0),
      demo.Row("SliceGPT's .pt", 1200),
      demo.Row('free', 750, 20.001, 1.3e-6, None, 12.34, 0.5),
      demo.Row(demo.REROUNDED, None, 20.002, 1e-6),
    ]
    lines = demo.to_text(rows).splitlines()
    assert lines[0].split()[:3] == ['bytes', 'reduction', 'perplexity']
    assert 'truth' not in lines[0]
    assert lines[2].split() == ["SliceGPT's", '.pt', '1,200', '-20.00%']
    assert lines[3].split() == [
      *('free', '750', '25.00%', '20.001', '1.3e-06', '12.3', '0.5')
    ]
    assert lines[4].split() == ['rotated,', 'rounded', 'again', '20.002', '1e-06']
    assert len({len(lines[0]), len(lines[3])}) == 1
    rows[2] = rows[2]._replace(kl_truth=3e-6)
    assert 'KL to truth' in demo.to_text(rows)
