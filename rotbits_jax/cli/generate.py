"""Continues a text: prints the text that a model generates after a prompt.

  rotbits generate --model=DIR|FILE --prompt=TEXT [--base=DIR|FILE] [--max_tokens=N]
    [--temperature=T] [--top_k=K] [--seed=N] [--json] [--verbose]

Example:

  rotbits generate --model=smollm2.rotbits --prompt="Once upon a time"

A model is a checkpoint's directory, its weights file, or a file that `rotbits encode`
wrote. The prompt is taken as it is: no template and no special token is added, but
those that the tokenizer knows may be written in it, such as `<|im_start|>`. Without a
temperature each token is the likeliest one. The model needs a tokenizer.json.

JSON:

  prompt  as it was given
  text    the text of the model
  tokens  list of the tokens that it wrote
"""

from collections.abc import Iterable, Iterator, Mapping
import itertools

import jax

from rotbits_jax import evaluation
from rotbits_jax.checkpoints import configs
from rotbits_jax.cli import program
from rotbits_jax.models import generation

FLAGS = program.Flags()
_MODEL = FLAGS.add('model', 'The model.', source=True, required=True)
_BASE = FLAGS.bases()
_PROMPT = FLAGS.add('prompt', 'The text to continue.', required=True)
_MAX_TOKENS = FLAGS.add(
  'max_tokens', 'Greatest number of tokens.', int, 128, lower_bound=1
)
_TEMPERATURE = FLAGS.add(
  'temperature',
  'Tokens are drawn with probabilities to the power 1/temperature.',
  float,
  0.0,
  lower_bound=0.0,
)
_TOP_K = FLAGS.add('top_k', 'Draw from this many of the most likely tokens.', int)
_SEED = FLAGS.add(
  'seed',
  'The seed of the random draws.',
  int,
  0,
  lower_bound=0,
  upper_bound=(1 << 32) - 1,  # JAX takes no more bits
)


def stream_text(
  files: Mapping[str, bytes], prompt: Iterable[int], tokens: Iterable[int]
) -> Iterator[str]:
  """Converts the tokens that follow a prompt to text, piece by piece.

  A token may hold only some of the bytes of a character. Therefore a piece is yielded
  when its last character is complete. Special tokens are omitted.

  Args:
    files: the checkpoint's sidecar files by name, including `tokenizer.json`.
    prompt: the tokens of the prompt. Spaces and incomplete characters at the beginning
      of the text depend on them.
    tokens: the tokens to convert.

  Yields:
    Pieces of the text.
  """
  tokenizer = evaluation.read_tokenizer(files)
  import tokenizers  # `read_tokenizer` has checked that it is installed

  start = lambda: tokenizers.decoders.DecodeStream(skip_special_tokens=True)
  stream, before = start(), [*prompt]
  for i, token in enumerate(itertools.chain(before, tokens)):
    try:
      piece = stream.step(tokenizer, int(token))
    except Exception as error:
      # A character that stays incomplete changes what was yielded before it.
      if 'Invalid prefix' not in str(error):
        raise
      stream = start()
      piece = stream.step(tokenizer, int(token))
    if piece and i >= len(before):
      yield piece


def main() -> program.Result:
  if not _PROMPT.value.strip():
    raise ValueError('--prompt has no words')
  checkpoint = program.read_model(_MODEL.value, _BASE.value)
  prompt = program.read_tokens(checkpoint.files, checkpoint.model.config, _PROMPT.value)
  tokens = generation.generate(
    checkpoint.model,
    prompt,
    max_tokens=_MAX_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    key=jax.random.key(_SEED.value),
    stop_tokens=configs.stop_tokens(checkpoint.files),
  )
  written: list[int] = []

  def noted() -> Iterator[int]:
    for token in tokens:
      written.append(int(token))
      yield written[-1]

  text = ''
  for piece in stream_text(checkpoint.files, prompt, noted()):
    text += piece
    if not FLAGS.json.value:
      print(piece, end='', flush=True)
  return {'prompt': _PROMPT.value, 'text': text, 'tokens': written}, ''
