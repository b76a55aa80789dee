"""Encodes a checkpoint as one smaller file, or as several (shards).

  rotbits encode SmolLM2-135M

CHECKPOINT is a folder or a file of weights, also as SliceGPT writes them. The presets:

  exact  keeps every bit. The default for dense checkpoints, of any family.
  free   keeps the function up to rounding; LoRA adapters no longer fit. The default for
         sliced checkpoints.
  near   rounds weights to multiples of about 2^STEP times their root mean square.
         --max_kl finds the coarsest steps for a bound on the mean KL divergence, which
         a part of --text measures; --target_size finds the finest steps for a size.
  paper  rotates a sliced model at random and gets the bits back, arXiv 2410.01309.

--config takes a preset and options from a file, by its name in configs/ or its path:

  rotbits encode SmolLM2-135M --config=free --config.tolerance=1.0

With --base the file holds only the differences from a model that the receiver has;
`rotbits decode` needs the same --base. With --verify the file appears only after it was
decoded and compared. With --shard_size, a run that was killed continues after its
complete shards; with --distributed, process i of n encodes every n-th shard. The texts
of --metadata=KEY=VALUE, which may be repeated, are shown by `rotbits inspect`.

Weights in formats that are not read (.bin, .pt, .onnx, .gguf, ...) beside safetensors,
hidden folders, and files that are too large are named as NOT STORED, and --verify then
writes nothing. --all_files stores such weights and large files byte for byte;
--exclude='*.onnx' leaves files out on purpose.

JSON: that of `rotbits inspect`; given_bytes of the weights files; missed, the files of
the folder that are not stored; excluded by --exclude; left_out, caches and encoded
files; plain_because, why the checkpoint is stored as plain tensors.
"""

import contextlib
import pathlib
import sys
import time
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import tqdm

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import presets
from rotbits_jax.cli import program
from rotbits_jax.file import output
from rotbits_jax.file import report as report_lib
from rotbits_jax.presets import steps
from rotbits_jax.system import files as files_lib
from rotbits_jax.system import outputs


def _config_flag() -> flags.FlagHolder[Any]:
  """Defines --config, which may have overrides in a file of --flagfile.

  ml_collections looks for these at once. A file that cannot be read is an error only
  when all flags are parsed.
  """
  arguments: list[str] = []
  with contextlib.suppress(flags.Error, OSError, ValueError):
    arguments = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
  purpose = 'A preset, with options.'
  return config_flags.DEFINE_config_file('config', None, purpose, sys_argv=arguments)


_BASE, _OVERWRITE = program.shared('base', 'overwrite')
_PRESET = flags.DEFINE_enum('preset', None, list(presets.PRESETS), 'What to keep.')
_CONFIG = _config_flag()
_SHARD_SIZE = flags.DEFINE_string('shard_size', None, 'Size of a shard, like 2GB.')
_EXCLUDE = flags.DEFINE_multi_string(
  'exclude', [], "Globs of files to leave out, like '*.onnx'."
)
_ALL_FILES = flags.DEFINE_bool(
  'all_files', False, 'Keep files of any format and size, byte for byte.'
)
_VERIFY = flags.DEFINE_bool('verify', False, 'Decode the file, and compare it.')
_METADATA = flags.DEFINE_multi_string('metadata', None, 'A text to keep, KEY=VALUE.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Divide shards among hosts.')

# Options of the preset `near`.
_STEP = flags.DEFINE_float('step', None, 'near: log2 of step / rms, like -5.')
_MAX_KL = flags.DEFINE_float('max_kl', None, 'near: bound of the mean KL in nats.')
_TARGET_SIZE = flags.DEFINE_string('target_size', None, 'near: a size, like 90MB.')
_TEXT = flags.DEFINE_string('text', None, 'near: a text to calibrate on.')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 4096, 'near: tokens of TEXT.', 2)
_OF_NEAR = _STEP, _MAX_KL, _TARGET_SIZE, _TEXT, _MAX_TOKENS
flags.mark_flags_as_mutual_exclusive(['step', 'max_kl', 'target_size'])
flags.mark_flags_as_mutual_exclusive(['config', 'preset'])


def main(checkpoint: str, file: str | None = None) -> program.Result | None:
  start, path = time.monotonic(), pathlib.Path(checkpoint)
  if not path.name.strip('.'):  # . or ..
    path = files_lib.real_path(path)
  stem = path.stem if path.is_file() else path.name
  target = file or str(path.with_name(f'{stem}.rotbits'))
  shard_size, overwrite = program.parse_size(_SHARD_SIZE), _OVERWRITE.value
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  output.check_path(target, shard_size, inputs=[checkpoint], overwrite=overwrite)
  selection = checkpoints.Selection(
    exclude=tuple(_EXCLUDE.value), all_files=_ALL_FILES.value
  )
  source = checkpoints.open_any(checkpoint, selection)
  # The search for steps takes minutes, in which no other run may take the target.
  is_shared = _DISTRIBUTED.value
  with contextlib.nullcontext() if is_shared else outputs.reserved(target):
    options = _options(source, target)
    rotbits_jax.encode_to_file(
      checkpoint,
      target,
      base=_BASE.value,
      shard_size=shard_size,
      exclude=selection.exclude,
      all_files=selection.all_files,
      metadata=_metadata(),
      overwrite=overwrite,
      check=_VERIFY.value,
      progress=True,
      **options,
    )
  if jax.process_index():
    return None
  report = rotbits_jax.inspect(files_lib.real_path(target))
  reason = getattr(source, 'reason', None)
  if report.family is None and reason is None:  # with the weights of sub-folders
    source = checkpoints.open_plain(checkpoint, selection)
  result = report.to_json() | {
    'given_bytes': source.input_bytes,
    'missed': list(report.missed),
    'excluded': list(report.excluded),
    'left_out': list(source.left_out),
    'plain_because': reason,
  }
  lines = [f'NOT STORED: {x} (keep the original of these)' for x in report.missed]
  if report.excluded:
    lines.append(f'excluded: {", ".join(report.excluded)}')
  if source.left_out:
    lines.append(f'not kept: {", ".join(source.left_out)}')
  if reason is not None:
    lines.append(f'stored as plain tensors, because {reason}')
  # The weights files may hold more than the tensors.
  input_bytes = min(source.input_bytes or report.input_bytes, report.input_bytes)
  if report.file_bytes >= input_bytes:
    lines.append('The file is not smaller than the weights: keep those.')
  comes_back = report_lib.BACK[report.keeps]
  if report.missed and report.keeps == 'bits':
    comes_back = 'the stored files come back, those above do not'
  if report.measured is not None:
    comes_back += f': {report.measured}'
  elif report.keeps == 'approximation':
    comes_back += '; measure it with rotbits evaluate'
  elif report.needs:
    comes_back += ', with the same --base'
  if _VERIFY.value:
    comes_back += f'; compared with {checkpoint}'
  sizes = input_bytes, report.file_bytes
  before, after = (tqdm.tqdm.format_sizeof(x, 'B') for x in sizes)
  share = f'{report.file_bytes / max(input_bytes, 1):.2%}'
  seconds = f'{time.monotonic() - start:.0f} s'
  lines.append(f'{share} ({before} => {after}, {target}) in {seconds}; {comes_back}')
  return result, '\n'.join(lines)


def _metadata() -> dict[str, str]:
  """Returns the texts of the flag --metadata by their keys."""
  texts: dict[str, str] = {}
  for text in _METADATA.value or ():
    key, separator, value = text.partition('=')
    if not key or not separator or key in texts:
      raise ValueError(f'--metadata must be KEY=VALUE, each key once, got {text!r}')
    texts[key] = value
  return texts


def _options(source: Any, target: str) -> dict[str, Any]:
  """Returns the options of `encode_to_file` that the flags say, for a source."""
  options: dict[str, Any] = {'preset': _PRESET.value}
  if _CONFIG.value is not None:
    options |= _CONFIG.value.to_dict()
    options.pop('experiment', None)
  used = [flag.name for flag in _OF_NEAR if flag.present]
  if used and _PRESET.value != 'near':
    raise ValueError(f'--{used[0]} is for --preset=near')
  if _MAX_KL.present and not _TEXT.present:
    raise ValueError('--max_kl needs a --text')
  if _STEP.present:
    options['step'] = _STEP.value
  if _TARGET_SIZE.present:
    options['target_size'] = program.parse_size(_TARGET_SIZE)
  if _TEXT.value is None:
    return options
  model = checkpoints.open_checkpoint(source.path)
  calibration = steps.calibrate(
    model,
    program.read_tokens(_TEXT.value, model.files),
    max_kl=_MAX_KL.value,
    max_tokens=_MAX_TOKENS.value,
    folder=files_lib.real_path(target).parent,
    progress=True,
  )
  return options | calibration.options
