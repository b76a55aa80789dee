r"""Encodes a checkpoint as one smaller file, or as shards.

  rotbits encode --checkpoint=DIR --output=FILE [--preset=free|exact|paper] [--json]
    [--shard_size=2GB] [--overwrite] [--verify]
    [--canonicaliser=polar_shortcut|qr|svd] [--rotation_codec=haar|symmetric_eig]
    [--correction=exact|threshold] [--entropy]

The preset `free` keeps the function that the model computes and changes its
coordinates; `exact` keeps every bit; `paper` gets rotations' bits back as in arXiv
2410.01309, and takes the flags of the third line: `svd`, `symmetric_eig` and
`threshold` together are what was published. A config file sets the preset and its
details:

  rotbits encode --checkpoint=DIR --output=FILE \
    --config=configs/free.py --config.tolerance=1.0

The file appears when it is complete; one that exists is replaced with --overwrite only.
--verify decodes what was written before the file appears, and compares it with the
checkpoint if the preset is `exact`.

A few layers at a time are in memory. A run that was killed or interrupted leaves the
folder `.FILE.partial`, and goes on where it was if the command is given again.

The devices of this process share the layers. On several hosts that see one file system,
run the command on each with --distributed: each writes shards of the layers that it
owns. Outside of TPU VMs, say who they are:

  rotbits encode --checkpoint=DIR --output=FILE --distributed \
    --coordinator=HOST:PORT --num_processes=2 --process_id=0
"""

import sys
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

import rotbits_jax
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
  'What to remove; free unless said otherwise.',
  flag_values=FLAGS,
)
_PAPER = {
  name: flags.DEFINE_enum(
    name,
    None,
    known,
    f'With --preset=paper; {known[0]} unless said otherwise.',
    flag_values=FLAGS,
  )
  for name, known in presets.CHOICES.items()
}
_ENTROPY = flags.DEFINE_bool(
  'entropy', None, 'With --preset=paper: code the numbers too.', flag_values=FLAGS
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
  'Bytes of one file, at most, like 2GB; one file unless said otherwise.',
  flag_values=FLAGS,
)
_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Replace a file that exists.', flag_values=FLAGS
)
_VERIFY = flags.DEFINE_bool(
  'verify', False, 'Decode what was written before it is there.', flag_values=FLAGS
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Share the work with other processes.', flag_values=FLAGS
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0.', flag_values=FLAGS
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes.', lower_bound=1, flag_values=FLAGS
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is.', lower_bound=0, flag_values=FLAGS
)


def read_config() -> presets.Preset:
  """The preset and its options, from --preset or --config.

  Raises:
    ValueError: if both are given, if the config has a field that is no option, or if
      a flag is not for the preset.
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
    return presets.make(preset, **parts)
  if _PRESET.value is not None or parts:
    raise ValueError('--config and flags of the preset exclude each other')
  fields = _CONFIG.value.to_dict()
  if 'preset' not in fields:
    raise ValueError('--config has no field preset')
  return presets.make(fields.pop('preset'), **fields)


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
  """The devices of this process side by side, if there are several."""
  devices = jax.local_devices()
  if len(devices) == 1:
    return None
  return jax.sharding.Mesh(np.array(devices), ('layers',))


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
