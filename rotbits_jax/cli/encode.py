r"""Encodes a checkpoint as one smaller file.

  rotbits encode --checkpoint=DIR --output=FILE [--preset=free|exact|paper] [--json]
    [--canonicaliser=polar_shortcut|qr|svd] [--rotation_codec=haar|symmetric_eig]
    [--correction=exact|threshold] [--entropy]

The preset `free` keeps the function that the model computes and changes its
coordinates; `exact` keeps every bit; `paper` gets rotations' bits back as in arXiv
2410.01309, and takes the flags of the second line: `svd`, `symmetric_eig` and
`threshold` together are what was published. A config file sets the preset and its
details:

  rotbits encode --checkpoint=DIR --output=FILE \
    --config=configs/free.py --config.tolerance=1.0
"""

import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

import rotbits_jax
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
  rotbits_jax.PRESETS,
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
  for name, known in rotbits_jax.codec.CHOICES.items()
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


def read_config() -> tuple[str, rotbits_jax.Settings]:
  """The preset and its settings, from --preset or --config.

  Raises:
    ValueError: if both are given, if the config has a field that is no setting, or if
      a flag is not for the preset.
  """
  parts: dict[str, Any] = {
    name: flag.value
    for name, flag in (*_PAPER.items(), ('entropy', _ENTROPY))
    if flag.value is not None
  }
  if _CONFIG.value is None:
    preset = _PRESET.value or rotbits_jax.PRESETS[0]
    if parts and preset != 'paper':
      raise ValueError(f'--{next(iter(parts))} is for --preset=paper, not {preset}')
    return preset, rotbits_jax.Settings(**parts)
  if _PRESET.value is not None or parts:
    raise ValueError('--config and flags of the preset exclude each other')
  fields = _CONFIG.value.to_dict()
  try:
    return fields.pop('preset'), rotbits_jax.Settings(**fields)
  except (KeyError, TypeError) as error:
    raise ValueError(f'--config has not a preset and its settings: {error}') from error


def main() -> None:
  preset, settings = read_config()
  program.check_output_file(_OUTPUT.value)
  checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
  data = rotbits_jax.encode(
    checkpoint.model,
    preset=preset,
    files=checkpoint.files,
    stem=checkpoint.stem,
    settings=settings,
    progress=True,
  )
  rotbits_jax.write_file(_OUTPUT.value, data)
  report = rotbits_jax.inspect(data)
  if _JSON.value:
    program.print_json(report.to_json())
  else:
    print(report.to_text())


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
