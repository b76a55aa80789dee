r"""Encodes a checkpoint as one smaller file, or as several (shards).

  rotbits encode --checkpoint=DIR --output=FILE [--preset=free|exact|near|paper]
    [--json] [--shard_size=2GB] [--overwrite] [--verify]
    [--canonicaliser=polar_shortcut|qr|svd] [--rotation_codec=haar|symmetric_eig]
    [--correction=exact|threshold] [--entropy]
    [--step=-5] [--max_kl=1e-3 --text=FILE]

The preset `free` keeps the function of the model and changes its weights to coordinates
that need fewer numbers. The preset `exact` keeps every bit. The preset `paper` codes
the weights after random rotations and gets the bits of the rotations back, as in arXiv
2410.01309. The last four flags above are for `paper`; the published scheme is `svd`,
`symmetric_eig` and `threshold` together. A config file sets the preset and its options:

  rotbits encode --checkpoint=DIR --output=FILE \
    --config=configs/free.py --config.tolerance=1.0

The preset `near` rounds each array to multiples of a power of two near 2^step times the
root of its mean square. With --max_kl it searches the coarsest steps that keep the mean
KL divergence on a text below a bound, and needs memory for the whole model in float32:

  rotbits encode --checkpoint=DIR --output=FILE --preset=near --max_kl=1e-3 --text=FILE

The file appears when it is complete. An existing file is replaced only with
--overwrite. With --verify the file is decoded before it appears; if the preset is
`exact`, the result is compared with the checkpoint.

Only a few layers at a time are in memory. If the command is killed or interrupted, the
folder `.FILE.partial` remains. The same command then continues after the last complete
layer.

The devices of this process share the layers. If several hosts share a file system, run
the command with --distributed on each of them. Each host writes shards with its own
layers. Outside of TPU VMs, the processes must be numbered:

  rotbits encode --checkpoint=DIR --output=FILE --distributed \
    --coordinator=HOST:PORT --num_processes=2 --process_id=0
"""

import pathlib
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import near
from rotbits_jax import presets
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A directory with weights and their config.json, or the weights file in it.',
  required=True,
  flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The file to write.', required=True, flag_values=FLAGS
)
_PRESET = flags.DEFINE_enum(
  'preset',
  None,
  tuple(presets.PRESETS),
  'The preset; free by default.',
  flag_values=FLAGS,
)
_PAPER = {
  name: flags.DEFINE_enum(
    name,
    None,
    known,
    f'Only for --preset=paper; {known[0]} by default.',
    flag_values=FLAGS,
  )
  for name, known in presets.CHOICES.items()
}
_ENTROPY = flags.DEFINE_bool(
  'entropy', None, 'Only for --preset=paper: entropy-code numbers.', flag_values=FLAGS
)
_STEP = flags.DEFINE_float(
  'step',
  None,
  'Only for --preset=near: log2 of the step over the root mean square; -5 by default.',
  flag_values=FLAGS,
)
_MAX_KL = flags.DEFINE_float(
  'max_kl',
  None,
  'Only for --preset=near: greatest mean KL divergence in nats, in place of --step.',
  lower_bound=0.0,
  flag_values=FLAGS,
)
_TEXT = flags.DEFINE_string(
  'text', None, 'The text on which --max_kl is measured.', flag_values=FLAGS
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens',
  4096,
  'How many tokens of the text --max_kl uses.',
  lower_bound=2,
  flag_values=FLAGS,
)
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file such as configs/free.py.', flag_values=FLAGS
)
_JSON = flags.DEFINE_bool(
  'json', False, 'Print one JSON object in place of the table.', flag_values=FLAGS
)

_SHARD_SIZE = flags.DEFINE_string(
  'shard_size',
  None,
  'Greatest size of a file, like 2GB. By default there is one file.',
  flag_values=FLAGS,
)
_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Replace an existing file.', flag_values=FLAGS
)
_VERIFY = flags.DEFINE_bool(
  'verify', False, 'Decode the file before it appears.', flag_values=FLAGS
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Share the work with other processes.', flag_values=FLAGS
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0.', flag_values=FLAGS
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes.', lower_bound=1, flag_values=FLAGS
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process.', lower_bound=0, flag_values=FLAGS
)


def read_config() -> presets.Preset:
  """Returns the preset that --preset or --config selects, with its options.

  Raises:
    ValueError: if both flags are given, if the config has an unknown field, or if a
      flag is for another preset.
  """
  parts: dict[str, Any] = {
    name: flag.value
    for name, flag in (*_PAPER.items(), ('entropy', _ENTROPY))
    if flag.value is not None
  }
  if _CONFIG.value is None:
    preset = _PRESET.value or 'free'
    if parts and preset != 'paper':
      raise ValueError(f'--{next(iter(parts))} is for --preset=paper, not {preset}')
    for flag in (_STEP, _MAX_KL, _TEXT):
      if flag.value is not None and preset != 'near':
        raise ValueError(f'--{flag.name} is for --preset=near, not {preset}')
    if (_MAX_KL.value is None) != (_TEXT.value is None):
      raise ValueError('--max_kl and --text are needed together')
    if _MAX_KL.value is not None and _STEP.value is not None:
      raise ValueError('--max_kl finds the step: --step cannot be given, too')
    if _MAX_KL.value is not None and _TEXT.value is not None:
      return search(_MAX_KL.value, _TEXT.value)
    if _STEP.value is not None:
      parts['step'] = _STEP.value
    return presets.make(preset, **parts)
  if _PRESET.value is not None or parts or _STEP.value or _MAX_KL.value:
    raise ValueError('--config cannot be combined with --preset or its options')
  fields = _CONFIG.value.to_dict()
  if 'preset' not in fields:
    raise ValueError('--config has no field preset')
  return presets.make(fields.pop('preset'), **fields)


def search(max_kl: float, text: str) -> presets.Preset:
  """Returns the preset `near` with the steps that --max_kl and --text select.

  The measured points go to stderr.
  """
  checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
  content = pathlib.Path(text).read_text(encoding='utf-8')
  tokenizer = evaluation.read_tokenizer(checkpoint.files)
  found = near.search(
    checkpoint.model,
    np.array(tokenizer.encode(content).ids),
    max_kl=max_kl,
    max_tokens=_MAX_TOKENS.value,
    progress=True,
  )
  for point in found.curve:
    print(f'step 2^{point.step:<7} KL {point.kl:.3g}', file=sys.stderr)
  print(f'chosen: 2^{found.step}', file=sys.stderr)
  return presets.near(step=found.step, offsets=found.offsets)


def main() -> None:
  preset = read_config()
  shard_size = program.parse_size('shard_size', _SHARD_SIZE.value)
  if _DISTRIBUTED.value:
    jax.distributed.initialize(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
  rotbits_jax.encode_to_file(
    _CHECKPOINT.value,
    _OUTPUT.value,
    preset=preset,
    shard_size=shard_size,
    mesh=local_mesh(),
    overwrite=_OVERWRITE.value,
    check=_VERIFY.value,
    progress=True,
  )
  if jax.process_index():
    return
  report = rotbits_jax.inspect(_OUTPUT.value)
  if _JSON.value:
    program.print_json(report.to_json())
  else:
    print(report.to_text())


def local_mesh() -> jax.sharding.Mesh | None:
  """Returns a mesh of the devices of this process; None if there is only one."""
  devices = jax.local_devices()
  if len(devices) == 1:
    return None
  return jax.sharding.Mesh(np.array(devices), ('layers',))


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
