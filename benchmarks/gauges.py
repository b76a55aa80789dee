"""Rounds one model to coarse steps in several gauges.

  python -m benchmarks.gauges [--checkpoint=DIR] [--steps=-4,-3,-2,-1]
    [--max_tokens=N] [--results=RESULTS.md]

A rotation of the residual stream is free, so `near` could round in any gauge. These are
compared: the canonical one, whose zeros need no bits; that of the checkpoint, which for
SliceGPT has decorrelated inputs; and a random one. In each the Fisher information of
the predictions gives every row and column its step, and errors are fed back. Bytes are
those of the matrices by the coder's own plans; the divergence is on another text than
that of the steps.
"""

from collections.abc import Iterator
import dataclasses
import sys

from absl import flags
import jax

from benchmarks import demo
from benchmarks import sections
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.cli import program
from rotbits_jax.evaluation import perplexity
from rotbits_jax.file import estimation
from rotbits_jax.presets import sensitivities

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  str(demo.ROOT / 'tests' / 'testdata' / 'opt-small-sliced-0.2'),
  'A sliced checkpoint with its tokenizer.',
  flag_values=FLAGS,
)
_STEPS = flags.DEFINE_list(
  'steps', ['-4', '-3', '-2', '-1'], 'Steps of near.', flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 2048, 'Tokens of each text to use.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file of results to write the section to.', flag_values=FLAGS
)

TITLE = '`near` in other gauges'
GAUGES = {
  'canonical': presets.near().transform,
  'as given': passes.chain(),
  'random': passes.chain(passes.random_rotation(key=jax.random.key(0))),
}


def in_gauge(context: passes.Context, transform: passes.Chain) -> models.Model:
  """Returns the model after a transform, with float32 parameters."""
  units = passes.rewrite(context.widened(), transform)
  model = passes.to_model(context.config, (x for some, _ in units for x in some))
  return jax.device_put(dataclasses.replace(model, stored_as=context.dtype.name))


def measure(
  checkpoint: rotbits_jax.Checkpoint,
) -> Iterator[tuple[str, str, int, float]]:
  """Yields the gauge, the step, the bytes and the divergence in nats."""
  model = checkpoint.model
  calibration, tokens = (
    evaluation.encode_text(checkpoint.files, demo.read_data(name))[: _MAX_TOKENS.value]
    for name in ('calibration.txt', 'evaluation.txt')
  )
  windows = perplexity.full_windows(calibration, model.config)
  context = passes.make_context(model, stored_as=model.stored_as)
  reference = {'model': dataclasses.replace(model.rounded(), buffers={})}
  for name, transform in GAUGES.items():
    unrounded = in_gauge(context, transform)
    inputs = {
      k: x for own in sensitivities.measure(unrounded, windows) for k, x in own.items()
    }
    for step in _STEPS.value:
      rounding = passes.to_steps(float(step), {}, inputs)
      own, places = context._replace(source=unrounded), range(context.config.num_layers)
      part = lambda name, own=own, rounding=rounding: passes.round_part(
        own, name, rounding
      )
      layers = [models.read_layer(part, context.config, i) for i in places]
      outer = part(None)
      rounded = models.from_layers(context.config, outer, layers)
      size = sum(estimation.of_leaf(leaf) for _, leaf in rounded.leaves())
      rounded = structured.astype(rounded, 'float32')
      measured = evaluation.compare({'rounded': rounded}, tokens, reference)
      yield name, step, round(size), measured['rounded'].kl['model']


def main() -> None:
  checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
  lines = [f'{"gauge":12}{"step":>8}{"bytes":>14}{"KL":>12}']
  for name, step, size, kl in measure(checkpoint):
    lines.append(f'{name:12}{f"2^{step}":>8}{size:14,}{kl:12.2e}')
    print(lines[-1], flush=True)
  if _RESULTS.value is not None:
    about = (
      f'`python -m benchmarks.gauges`: {checkpoint.stem}, {sections.machine()}.\nBytes '
      f'are those of the matrices; KL is on {_MAX_TOKENS.value:,} tokens. The '
      'canonical gauge wins at every step,\nbecause its zeros need no bits.'
    )
    text = '\n'.join(lines)
    sections.write(_RESULTS.value, TITLE, sections.with_table(about, text))


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
