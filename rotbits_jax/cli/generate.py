"""Continues a text: prints the text that a model generates after a prompt.

  rotbits generate --model=DIR|FILE --prompt=TEXT [--max_tokens=N] [--temperature=T]
    [--top_k=K] [--seed=N] [--json] [--verbose]

Example:

  rotbits generate --model=smollm2.rotbits --prompt="Once upon a time"

A model is a checkpoint's directory, its weights file, or a file that `rotbits encode`
wrote. The prompt is taken as it is: no template and no special token is added, but
those that the tokenizer knows may be written in it, such as `<|im_start|>`. Without a
temperature each token is the likeliest one. The model needs a tokenizer.json.

JSON:

  prompt  as it was given
  text    what the model wrote
  tokens  list of the tokens that it wrote
"""

from collections.abc import Iterable, Iterator, Mapping
import sys

from absl import flags
import jax

from rotbits_jax import evaluation
from rotbits_jax.checkpoints import configs
from rotbits_jax.cli import program
from rotbits_jax.models import generation

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  'model', None, 'The model.', required=True, flag_values=FLAGS
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'The text to continue.', required=True, flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 128, 'Greatest number of tokens.', lower_bound=1, flag_values=FLAGS
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature',
  0.0,
  'Tokens are drawn with probabilities to the power 1/temperature.',
  lower_bound=0.0,
  flag_values=FLAGS,
)
_TOP_K = flags.DEFINE_integer(
  'top_k', None, 'Draw from this many of the most likely tokens.', flag_values=FLAGS
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'The seed of the random draws.', flag_values=FLAGS
)
_JSON, _VERBOSE = program.define_output_flags(FLAGS)


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

  stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
  for token in prompt:
    stream.step(tokenizer, int(token))
  for token in tokens:
    piece = stream.step(tokenizer, int(token))
    if piece:
      yield piece


def main() -> None:
  if not _PROMPT.value.strip():
    raise ValueError('--prompt has no words')
  model, files, _ = program.read_model(_MODEL.value)
  prompt = evaluation.encode_text(files, _PROMPT.value)
  tokens = generation.generate(
    model,
    prompt,
    max_tokens=_MAX_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    key=jax.random.key(_SEED.value),
    stop_tokens=configs.stop_tokens(files),
  )
  if _JSON.value:
    written = [int(token) for token in tokens]
    text = ''.join(stream_text(files, prompt, written))
    program.print_json({'prompt': _PROMPT.value, 'text': text, 'tokens': written})
    return
  for piece in stream_text(files, prompt, tokens):
    print(piece, end='', flush=True)
  print()


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
