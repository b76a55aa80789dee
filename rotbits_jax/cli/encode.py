r"""Encodes a checkpoint as one smaller file, or as several (shards).

  rotbits encode --checkpoint=DIR --output=FILE [--preset=free|exact|near|paper]
    [--shard_size=2GB] [--overwrite] [--verify] [--json] [--verbose]
    [--canonicaliser=polar_shortcut|qr|svd] [--rotation_codec=haar|symmetric_eig]
    [--correction=exact|threshold] [--entropy]
    [--step=-5] [--max_kl=1e-3 --text=FILE [--max_tokens=4096]]
    [--config=NAME|FILE] [--distributed]

Example:

  rotbits encode --checkpoint=SmolLM2-135M --output=smollm2.rotbits
  rotbits decode --input=smollm2.rotbits --output=SmolLM2-again

DIR is a checkpoint of Hugging Face (safetensors or pytorch_model.bin, sharded or not)
or of Microsoft's SliceGPT, or the path of a GGUF file. The presets:

  exact  keeps every bit. The default for dense checkpoints. Checkpoints of unknown
         families are stored as plain tensors, and decode to the same files.
  free   keeps the function that the model computes and changes its coordinates. The
         default for sliced checkpoints, which it makes two fifths smaller. On dense
         ones it saves little more than exact. Adapters that were trained on the input
         do not fit the decoded model.
  near   changes the function a little and makes the file much smaller: numbers are
         rounded to coarse steps. Measure what it costs with `rotbits evaluate`.
  paper  rotates the weights at random and gets the bits of the rotations back, as in
         arXiv 2410.01309. The function stays, the numbers change. --canonicaliser,
         --rotation_codec and --correction choose its parts: svd, symmetric_eig and
         threshold are as published.

--config sets the preset and its options. It takes a name or the path of a file like
those in the folder configs of the repository, which has the presets and the published
experiments:

  rotbits encode --checkpoint=DIR --output=FILE --config=free --config.tolerance=1.0
  rotbits encode --checkpoint=DIR --output=FILE --config=opt_6_7b

The preset `near` rounds the numbers of an array to multiples of a step, which is near
2^step times their root mean square. With --max_kl it searches the coarsest steps that
keep the mean KL divergence on a text below a bound, and needs memory for the whole
model in float32:

  rotbits encode --checkpoint=DIR --output=FILE --preset=near --max_kl=1e-3 --text=FILE

The file appears when it is complete. An existing file is replaced only with
--overwrite. With --verify the file is decoded before it appears; if the preset is
`exact`, the result is compared with the checkpoint.

A few layers at a time are in memory. A run that was killed or interrupted leaves the
folder `.FILE.partial`, and continues behind the last complete layer when the same
command is given again. The devices of this process share the layers. On several hosts
that see one file system, run the command on each with --distributed: each host writes
shards of its own layers. Outside of TPU VMs, say which process this is:

  rotbits encode --checkpoint=DIR --output=FILE --distributed \
    --coordinator=HOST:PORT --num_processes=2 --process_id=0

JSON:

  preset            name of the preset
  family            model family; null for plain tensors
  numbers.input     count of the numbers in the input's tensors
  numbers.stored    count of the numbers that the file keeps
  bytes.input       bytes of the input's tensors
  bytes.file        bytes of the file, or of all shards
  lines             list of objects: name, numbers_saved, bytes_saved; they add up to
                    the differences above
  remarks           list of sentences on what the decoded weights are
  notes             with --verbose: for each transform, a list of objects
  given_bytes       bytes of the weights files of the input; null if unknown
  left_out          list of the files and folders beside the weights that are not kept
  plain_because     why the checkpoint is stored as plain tensors, or null
  curve             list of objects: step, kl; what --max_kl measured, or null
"""

import sys
from typing import Any

from absl import flags
import jax
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import near
from rotbits_jax import presets
from rotbits_jax.cli import program
from rotbits_jax.system import outputs

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
  'What to remove; by default free for sliced checkpoints and exact for others.',
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
_CONFIG = program.define_config_flag(
  FLAGS, 'A preset with its options: a name or a file.'
)
_JSON, _VERBOSE = program.define_output_flags(FLAGS)

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


def read_preset(kind: str) -> tuple[presets.Preset, near.Found | None]:
  """Returns the preset and its options, from --preset or --config.

  Args:
    kind: the preset that suits the checkpoint, if none is given.

  Returns:
    The preset; and with --max_kl the result of the search, whose points go to stderr.

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
    name = _PRESET.value or kind
    if parts and name != 'paper':
      raise ValueError(f'--{next(iter(parts))} is for --preset=paper, not {name}')
    for flag in (_STEP, _MAX_KL, _TEXT):
      if flag.value is not None and name != 'near':
        raise ValueError(f'--{flag.name} is for --preset=near, not {name}')
    if (_MAX_KL.value is None) != (_TEXT.value is None):
      raise ValueError('--max_kl and --text are needed together')
    if _MAX_KL.value is not None and _STEP.value is not None:
      raise ValueError('--max_kl finds the step: --step cannot be given, too')
    if _MAX_KL.value is not None and _TEXT.value is not None:
      found = search(_MAX_KL.value, _TEXT.value)
      preset = presets.near(step=found.step, offsets=found.offsets, inputs=found.inputs)
      return preset, found
    if _STEP.value is not None:
      parts['step'] = _STEP.value
    return presets.make(name, **parts), None
  others = (_PRESET, _STEP, _MAX_KL, _TEXT)
  if parts or any(flag.value is not None for flag in others):
    raise ValueError('--config cannot be combined with --preset or its options')
  fields = _CONFIG.value.to_dict()
  fields.pop('experiment', None)  # `rotbits accounting` takes it
  if 'preset' not in fields:
    raise ValueError('--config has no field preset')
  return presets.make(fields.pop('preset'), **fields), None


def search(max_kl: float, text: str) -> near.Found:
  """Returns the steps that --max_kl and --text select; the points go to stderr."""
  outputs.check(outputs.resolved(_OUTPUT.value), overwrite=_OVERWRITE.value)
  checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
  found = near.search(
    checkpoint.model,
    evaluation.encode_text(checkpoint.files, program.read_text(text)),
    max_kl=max_kl,
    max_tokens=_MAX_TOKENS.value,
    progress=True,
  )
  for point in found.curve:
    print(f'step 2^{point.step:<7} KL {point.kl:.3g}', file=sys.stderr)
  print(f'chosen: 2^{found.step}', file=sys.stderr)
  return found


def main() -> None:
  shard_size = program.parse_size('shard_size', _SHARD_SIZE.value)
  if _DISTRIBUTED.value:
    jax.distributed.initialize(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
  source = checkpoints.open_any(_CHECKPOINT.value)
  preset, found = read_preset(presets.default(getattr(source, 'config', None)))
  rotbits_jax.encode_to_file(
    source,
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
  beside = {
    'given_bytes': source.input_bytes,
    'left_out': list(source.left_out),
    'plain_because': getattr(source, 'reason', None),
    'curve': None if found is None else [x._asdict() for x in found.curve],
  }
  if _JSON.value:
    program.print_json(report.to_json(verbose=_VERBOSE.value) | beside)
  else:
    width = None if _VERBOSE.value else program.terminal_width()
    print(report.to_text(verbose=_VERBOSE.value, width=width))
    if beside['left_out']:
      print()
      program.say(f'not kept: {", ".join(source.left_out)}')
    if beside['plain_because']:
      print()
      program.say(f'stored as plain tensors, because {beside["plain_because"]}')
  if report.file_bytes >= source.input_bytes:
    program.warn(
      f'{_OUTPUT.value} has {report.file_bytes:,} bytes, and the weights that were '
      f'given have {source.input_bytes:,}: keep those'
    )


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
