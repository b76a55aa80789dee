"""Tests of the benchmark's synthetic checkpoints, at tiny sizes."""

import jax
import numpy as np

from benchmarks import synthetic
from rotbits_jax import checkpoints
from rotbits_jax import models

TINY = synthetic.llama(96, 2, num_attention_heads=4, vocab_size=120)


def test_it_is_a_checkpoint_whose_shortcuts_are_those_of_subspaces(tmp_path):
  config = synthetic.write(tmp_path / 'x', TINY)
  assert config.segment_widths == (72,) * 4 + (96,)
  model = checkpoints.load_checkpoint(tmp_path / 'x').model
  assert model.config == config
  logits = jax.jit(models.logits)(model, np.arange(20)[None])
  assert np.isfinite(logits).all()
  assert np.std(logits) > 0.1
  for index in range(config.num_layers):
    for name in ('attention_shortcut', 'mlp_shortcut'):
      kernel = np.float32(model.layer(index)[name]['kernel'])
      values = np.linalg.svd(kernel, compute_uv=False)
      ones = 72 - 24 if kernel.shape[1] == 72 else 72
      assert (abs(values - 1) < 2e-3).sum() >= ones
