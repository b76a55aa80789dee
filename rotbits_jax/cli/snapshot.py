"""Decodes a file to a folder that other programs load, once, and prints the folder.

  vllm serve "$(rotbits snapshot SmolLM2-135M.rotbits)"

The folder is for transformers, vLLM, MaxText, Tunix and Keras; do not write into it. It
is in ROTBITS_JAX_CACHE, or in ~/.cache/rotbits_jax, and named by a digest of the file,
so a second call finds it again. A sliced model gets the format `transformers`.

JSON: folder.
"""

import rotbits_jax
from rotbits_jax.cli import program

(_BASE,) = program.shared('base')


def main(file: str) -> program.Result:
  folder = rotbits_jax.snapshot(file, _BASE.value, progress=True)
  return {'folder': str(folder)}, str(folder)
