"""Continues a text with a checkpoint, a token at a time.

  python examples/generate.py FOLDER|FILE "Once upon a time"

A model is a checkpoint's folder, or a file that `rotbits encode` wrote. Each token is
the most likely one. There is no cache of keys and values: the whole text is computed
again for each token, padded to one length so that one program is compiled. For more,
decode the file and load it in transformers or vLLM.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import rotbits_jax
from rotbits_jax import models


@jax.jit
def next_token(model: models.Model, tokens: jax.Array, length: jax.Array) -> jax.Array:
  """Returns the most likely token after the first `length` of `[T]` tokens."""
  # Causal attention: the padding changes nothing before it.
  return jnp.argmax(models.logits(model, tokens[None])[0, length - 1])


def generate(model: models.Model, prompt: list[int], count: int) -> list[int]:
  """Returns the `count` most likely tokens after a prompt."""
  model = jax.device_put(model.replace(buffers={}))
  tokens = np.full(len(prompt) + count, prompt[-1])
  tokens[: len(prompt)] = prompt
  for length in range(len(prompt), len(tokens)):
    tokens[length] = next_token(model, tokens, length)
  return tokens[len(prompt) :].tolist()


def main(path: str, text: str, count: int = 64) -> str:
  """Returns the text that a model writes after a text."""
  is_file = path.endswith('.rotbits')
  load = rotbits_jax.decode_checkpoint if is_file else rotbits_jax.load_checkpoint
  checkpoint = load(path)
  tokenizer = tokenizers.Tokenizer.from_buffer(checkpoint.files['tokenizer.json'])
  prompt = tokenizer.encode(text, add_special_tokens=False).ids
  return tokenizer.decode(generate(checkpoint.model, prompt, count))


if __name__ == '__main__':
  print(main(*sys.argv[1:3]))
