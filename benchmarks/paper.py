r"""Measures the preset `paper` on a checkpoint of a published size.

  python -m benchmarks.paper [--model=opt-1.3b] [--slicing=0.2] [--layers=N] \
      [--canonicalizer=svd|qr|polar_shortcut] [--rotation_codec=haar|symmetric_eig] \
      [--entropy] [--directory=DIR]

The program writes a synthetic checkpoint with a few layers (see
`benchmarks.synthetic`), encodes it, decodes it and checks the result. It takes the
median time of a layer, without the first layer, which compiles. From that it estimates
the time for the whole model, in seconds by the clock and in CPU seconds. CPU seconds
are more telling if other processes share the machine. Peak memory is the resident size
of the process, which includes the pages of mapped files.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time
from typing import Any

from absl import flags
import numpy as np

from benchmarks import synthetic
from configs import published
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import presets
from rotbits_jax.cli import program
from rotbits_jax.system import schema

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_enum(
  'model',
  'opt-1.3b',
  list(published.MODELS),
  'The model whose sizes to take.',
  flag_values=FLAGS,
)
_SLICING = flags.DEFINE_float(
  'slicing', 0.2, 'The part of the hidden size to remove.', flag_values=FLAGS
)
_LAYERS = flags.DEFINE_integer(
  'layers', 3, 'Number of layers.', lower_bound=1, flag_values=FLAGS
)
_CANONICALIZER = flags.DEFINE_string(
  'canonicalizer', 'polar_shortcut', 'How to recover rotations.', flag_values=FLAGS
)
_ROTATION_CODEC = flags.DEFINE_string(
  'rotation_codec', 'haar', 'How to sample rotations.', flag_values=FLAGS
)
_ENTROPY = flags.DEFINE_bool(
  'entropy', False, 'Whether to entropy code the numbers.', flag_values=FLAGS
)
_DIRECTORY = flags.DEFINE_string(
  'directory', None, 'The directory for files; default: temporary.', flag_values=FLAGS
)


class Clock:
  """A source that records when each layer is first read from another source."""

  def __init__(self, source: Any):
    self.source, self.config = source, source.config
    self.began = _now()
    self.layers: dict[int, np.ndarray] = {}

  @property
  def records(self) -> tuple[str, ...]:
    """Names of the records."""
    return self.source.records

  def specs(self, record: str) -> models.Params:
    """Returns the shapes and dtypes of a record."""
    return self.source.specs(record)

  def read(self, record: str) -> models.Params:
    """Returns the parameters of a record."""
    index = models.names.layer_index(record)
    if index is not None:
      self.layers[index] = _now()
    return self.source.read(record)

  def report(self, task: str, layers: int, segments_per_layer: int) -> None:
    """Prints the seconds so far, per segment, and estimated for the whole model.

    Args:
      task: name of the timed task.
      layers: number of layers of the whole model.
      segments_per_layer: number of residual segments per layer.
    """
    total = _now() - self.began
    times = sorted(self.layers.values(), key=lambda x: x[0])
    spent = [b - a for a, b in itertools.pairwise(times)]
    # The first layer compiles.
    layer = np.median(spent[1:] or spent or [total], axis=0)
    whole = (total + (layers - len(times)) * layer) / 60
    segment = layer / segments_per_layer
    print(
      f'{task}: {total[0]:.1f} s ({total[1]:.1f} CPU s), {segment[0]:.2f} s '
      f'({segment[1]:.2f}) per segment; {layers} layers: {whole[0]:.1f} min '
      f'({whole[1]:.1f}); peak memory {_peak() / 1e9:.2f} GB'
    )


def _now() -> np.ndarray:
  """Returns seconds by the clock, and CPU seconds."""
  return np.array([time.perf_counter(), time.process_time()])


def _peak() -> float:
  """Returns the greatest resident size since the last call, in bytes (Linux only)."""
  status = pathlib.Path('/proc/self/status').read_text()
  (line,) = (x for x in status.splitlines() if x.startswith('VmHWM'))
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return 1024.0 * int(line.split()[1])


def run(directory: pathlib.Path, options: paper.Options) -> None:
  """Writes, encodes and decodes a checkpoint, and prints the measurements."""
  dense = checkpoints.parse_config(published.MODELS[_MODEL.value])
  step, layers = dense.segments_per_layer, dense.num_layers
  count = min(_LAYERS.value, layers)
  checkpoint, path = directory / 'checkpoint', directory / 'message'
  synthetic.write(
    checkpoint,
    dataclasses.replace(
      dense,
      num_layers=count,
      segment_widths=(dense.hidden_size,) * (step * count + 1),
    ),
    sparsity=_SLICING.value,
    name=_MODEL.value,
    progress=True,
  )
  _peak()
  clock: Any = Clock(checkpoints.open_checkpoint(checkpoint))
  with path.open('wb') as file:

    def spill(words: np.ndarray) -> None:
      file.write(words.tobytes())

    encoded = paper.encode(clock, options, spill, progress=True)
  clock.report('encode', layers, step)
  widths = clock.config.segment_widths
  parameters = [d * (d - 1) / 2 for d in widths]
  corrections = encoded.streams['corrections']
  print(
    f'{8 * encoded.saving.bytes / sum(parameters):.2f} bits per free number of the '
    f'rotations; corrections {16 * corrections.size / sum(parameters):.2f}; '
    f'{encoded.layout["sampled"].count(False)} of {len(widths)} not sampled'
  )
  given = models.count_elements(clock.config) * 2
  stored = path.stat().st_size + corrections.nbytes
  print(f'{given:,} bytes to {stored:,} ({100 * stored / given:.2f}%)')

  clock = Clock(clock.source)
  streams = {'message': np.memmap(path, np.uint16, 'r'), **encoded.streams}
  layout, config = encoded.layout, clock.config
  for name, _ in paper.decode(options, layout, streams, config, progress=True):
    index = models.names.layer_index(name)
    if index is not None:
      clock.layers.setdefault(index, _now())
  clock.report('decode', layers, step)


def main() -> None:
  options: dict[str, Any] = {
    'canonicalizer': _CANONICALIZER.value,
    'rotation_codec': _ROTATION_CODEC.value,
    'entropy': _ENTROPY.value,
  }
  with contextlib.ExitStack() as stack:
    directory = _DIRECTORY.value
    if directory is None:
      directory = stack.enter_context(tempfile.TemporaryDirectory())
    made = schema.load(paper.Options, presets.paper(**options).options)
    run(pathlib.Path(directory), made)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
