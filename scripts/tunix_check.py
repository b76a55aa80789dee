"""Checks that Tunix loads a snapshot, and that its model gives the same logits.

  pip install google-tunix . && python -m scripts.tunix_check

It stands beside the suite because of all that Tunix depends on.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params

import rotbits_jax

CHECKPOINT = pathlib.Path(__file__).parents[1] / 'tests/testdata/llama-tiny-dense'
ROPE_THETA = 1_000_000  # Tunix 0.1.7 uses no other for Llama, whatever the config says
MOST_ERROR = 1e-2  # relative to the greatest logit; Tunix computes in float16


def main() -> int:
  with tempfile.TemporaryDirectory() as folder:
    os.environ['ROTBITS_JAX_CACHE'] = folder
    file, given = (pathlib.Path(folder, name) for name in ('x', 'given'))
    shutil.copytree(CHECKPOINT, given)
    path = given / 'config.json'
    settings = json.loads(path.read_text()) | {'rope_theta': ROPE_THETA}
    path.write_text(json.dumps(settings))
    rotbits_jax.encode_to_file(given, file)
    own = rotbits_jax.load(file)
    config = own.config
    theirs = params.create_model_from_safe_tensors(
      str(rotbits_jax.snapshot(file)),
      llama.ModelConfig(
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
        weight_tying=config.tied_head,
      ),
    )
    tokens = np.arange(1, 17)[None]
    mask = np.tri(16, dtype=bool)[None]
    found, _ = theirs(tokens, np.arange(16)[None], None, mask)
    expected = rotbits_jax.models.logits(own, tokens)
  error = float(np.abs(found - expected).max() / np.abs(expected).max())
  assert error <= MOST_ERROR, f'logits are off by {error:.2g}'
  print(f'logits are off by {error:.2g}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
