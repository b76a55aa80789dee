"""The program behind demo.sh."""

import word_checkpoints

from benchmarks import demo
import rotbits_jax


class TestDemo:
  def test_measures_each_preset(self, tmp_path):
    source = word_checkpoints.copy_with_tokenizer(
      'llama-tiny-sliced-head-0.25', tmp_path
    )
    (weights,) = source.glob('*.pt')
    text = word_checkpoints.random_text(40)
    file, raw, *presets = demo.measure(weights, text, tmp_path, max_tokens=32)
    assert file.bytes == weights.stat().st_size
    assert raw.bytes < file.bytes  # the .pt holds what slicing cut off
    assert tuple(row.name for row in presets) == rotbits_jax.PRESETS
    for row in presets:
      assert row.bytes == (tmp_path / f'{row.name}.rotbits').stat().st_size
      assert row.bytes < raw.bytes
      assert abs(row.perplexity / raw.perplexity - 1) < 1e-3
      assert row.kl <= 2 * row.kl_floor
    by_name = {row.name: row for row in presets}
    assert by_name['exact'].kl == 0
    assert by_name['free'].bytes < by_name['exact'].bytes

  def test_its_checkpoint_is_there(self):
    assert demo.WEIGHTS.is_file()

  def test_table(self):
    rows = [
      demo.Row("SliceGPT's .pt", 1200),
      demo.Row('raw tensors', 1000, 20.0),
      demo.Row('free', 750, 20.001, 1.3e-6, 1e-6, 12.34, 0.5),
    ]
    lines = demo.to_text(rows).splitlines()
    assert lines[0].split()[:3] == ['bytes', 'reduction', 'perplexity']
    assert lines[1].split() == ["SliceGPT's", '.pt', '1,200', '-20.00%']
    assert lines[3].split() == [
      *('free', '750', '25.00%', '20.001', '1.3e-06', '1e-06', '12.3', '0.5')
    ]
    assert len({len(line) for line in lines[3:]} | {len(lines[0])}) == 1
