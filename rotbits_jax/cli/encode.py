r"""Encodes a checkpoint as one smaller file, or as several (shards).

  rotbits encode --checkpoint=DIR --output=FILE [--preset=free|exact|near|paper]
    [--max_kl=KL|--target_size=90MB|--bits=B] [--text=FILE]
    [--base=DIR|FILE] [--same_files] [--shard_size=2GB]
    [--overwrite] [--verify] [--config=NAME|FILE] [--distributed] [--json] [--verbose]

Example:

  rotbits encode --checkpoint=SmolLM2-135M --output=smollm2.rotbits
  rotbits decode --input=smollm2.rotbits --output=SmolLM2-again

It ends with one line: the share of the bytes, the sizes, the file, the
time, and what comes back. `rotbits inspect` shows what is in the file, and
`rotbits estimate` says beforehand what each preset would give.

DIR is a checkpoint of Hugging Face (safetensors or pytorch_model.bin, sharded or not)
or of Microsoft's SliceGPT, or the path of a GGUF file, which is taken alone: not the
files beside it, and of its tokenizer only SmolLM's. Its weights come back as
safetensors, quantised ones rounded to float16. The presets:

  exact  keeps every bit. The default for dense checkpoints. Checkpoints of unknown
         families are stored as plain tensors, and decode to the same files.
  free   keeps the function that the model computes, up to rounding, and changes its
         coordinates. The default for sliced checkpoints, which it makes two fifths
         smaller. On dense ones with RMSNorm and an untied head it saves about a bit
         an element more than exact, on others next to nothing.
         Adapters that were trained on the input do not fit the decoded model.
  near   changes the function a little and makes the file much smaller: elements are
         rounded to coarse steps. Measure the cost with `rotbits evaluate`.
  paper  rotates the weights at random and gets the bits of the rotations back, as in
         arXiv 2410.01309. The function stays, the elements change. Dense models are
         refused. --canonicalizer, --rotation_codec and --correction choose its parts:
         svd, symmetric_eig and threshold are as published.

A dense checkpoint comes back in safetensors files, in the shards that it had. With
--same_files it comes back in the same files, byte for byte, also if they are .bin. Then
the preset must be `exact`, and the file holds plain tensors, as of an unknown family.

--config sets the preset and its options. It takes a name or the path of a file like
those in the folder configs of the repository, which has the presets and the published
experiments:

  rotbits encode --checkpoint=DIR --output=FILE --config=free \
    --config.tolerance=1.0
  rotbits encode --checkpoint=DIR --output=FILE --config=opt_6_7b

The preset `near` rounds the elements of an array to multiples of a step, which is near
2^step times their root mean square. With --max_kl it searches the coarsest steps that
keep the mean KL divergence on a text below a bound. With --target_size or --bits it
searches the finest step with which the file is at most so large, and within 1% of it
where steps between exist; --bits are those of the whole file for each element of the
input. A --text then divides
the bits among the parameters. The work on a text is layer by layer, too, and has a
temporary file beside the output, which is several times as large as the model:

  rotbits encode --checkpoint=DIR --output=FILE --preset=near --max_kl=1e-3 \
    --text=FILE
  rotbits encode --checkpoint=DIR --output=FILE --preset=near --target_size=90MB

With --base the file holds only how a model differs from one that the receiver has, such
as the base of a fine-tune or an earlier checkpoint of one run. Every bit comes back.
Whoever decodes the file gives the same base. A base may be a rotbits file that needs a
base itself, which then follows by another --base:

  rotbits encode --checkpoint=TUNED --base=BASE --output=tuned.rotbits
  rotbits decode --input=tuned.rotbits --base=BASE --output=TUNED-again

The file appears when it is complete. An existing file is replaced only with
--overwrite, and never one of the checkpoint or the base. With --verify the
file is decoded before it appears; if the preset is `exact`, the result is compared with
the checkpoint.

A few layers at a time are in memory. A run that was killed or interrupted leaves the
folder `.FILE.partial`, and continues after the last complete layer when the same
command is given again, but for --preset=paper and runs with --text. On
several hosts that see one file system, run the command on each with --distributed: each
host writes shards of its own layers. Outside of TPU VMs, say which process this is:

  rotbits encode --checkpoint=DIR --output=FILE --distributed \
    --coordinator=HOST:PORT --num_processes=2 --process_id=0

JSON:

  preset            name of the preset
  keeps             what comes back: bits, function or approximation
  family            model family; null for plain tensors
  elements.input    count of the elements of the input's tensors
  elements.stored   count of the elements that the file keeps
  bytes.input       bytes of the input's tensors
  bytes.file        bytes of the file, or of all shards
  lines             list of objects: name, elements_saved, bytes_saved; they add up to
                    the differences above
  remarks           list of sentences on the decoded weights
  base              list of the tensors of a base that the file needs, each as the list
                    of its path, shape, dtype and CRC-32
  notes             with --verbose: for each transform, a list of objects
  given_bytes       bytes of the weights files of the input; null if unknown
  left_out          list of what is not kept: files and folders beside the weights,
                    metadata of safetensors files, and a GGUF file's tokenizer
  plain_because     why the checkpoint is stored as plain tensors, or null
  curve             list of objects: step, kl; the points of --max_kl, or null
"""

import inspect
import re
import time
import types
import typing
from typing import Any, Literal, NamedTuple

from absl import flags
import jax

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import presets
from rotbits_jax.cli import program
from rotbits_jax.file import encode as encode_lib
from rotbits_jax.file import estimation
from rotbits_jax.file import savings
from rotbits_jax.presets import steps
from rotbits_jax.system import outputs
from rotbits_jax.system import status
from rotbits_jax.system import text as text_lib

FLAGS = program.Flags()
_CHECKPOINT = FLAGS.add(
  'checkpoint',
  'A directory with weights and their config.json, or the weights file in it.',
  source=True,
  required=True,
)
_OUTPUT = FLAGS.add('output', 'The file to write.', required=True)
_PRESET = FLAGS.add(
  'preset',
  'What to remove; by default free for sliced checkpoints and exact for others.',
  tuple(presets.PRESETS),
)
_BASE = FLAGS.bases()
_CONFIG = FLAGS.config('A preset with its options: a name or a file.')
_MAX_KL = FLAGS.add(
  'max_kl',
  'Only for --preset=near: greatest mean KL divergence in nats, in place of --step.',
  float,
  lower_bound=0.0,
)
_TARGET_SIZE = FLAGS.add(
  'target_size',
  'Only for --preset=near: greatest size of the file, like 90MB, in place of --step.',
)
_BITS = FLAGS.add(
  'bits',
  'Only for --preset=near: greatest number of bits of the file for each element of the '
  'input, in place of --step.',
  float,
  lower_bound=0.0,
)
_TEXT = FLAGS.add(
  'text',
  'Only for --preset=near: the text on which --max_kl is measured; with --target_size '
  'or --bits, one that divides the bits.',
)
_MAX_TOKENS = FLAGS.add(
  'max_tokens',
  'Only for --preset=near: how many tokens of the text to use.',
  int,
  4096,
  lower_bound=2,
)
_SHARD_SIZE = FLAGS.add(
  'shard_size',
  'Greatest size of a shard before coding, like 2GB. By default there is one file.',
)
_OVERWRITE = FLAGS.add('overwrite', 'Replace an existing file.', bool, False)
_VERIFY = FLAGS.add('verify', 'Decode the file before it appears.', bool, False)
_SAME_FILES = FLAGS.add(
  'same_files',
  'Only for --preset=exact: give back the same weights files, byte for byte, as for '
  'unknown families.',
  bool,
  False,
)
_DISTRIBUTED = FLAGS.add(
  'distributed', 'Share the work with other processes.', bool, False
)
_COORDINATOR = FLAGS.add('coordinator', 'HOST:PORT of process 0.')
_NUM_PROCESSES = FLAGS.add('num_processes', 'Number of processes.', int, lower_bound=1)
_PROCESS_ID = FLAGS.add('process_id', 'Number of this process.', int, lower_bound=0)


class _Option(NamedTuple):
  """The flag for an option, and the names of the presets that have the option."""

  flag: flags.FlagHolder[Any]
  presets: list[str]


def _define_options() -> dict[str, _Option]:
  """Defines flags for the options of presets that are numbers, switches or names.

  Their types, defaults and help are those of the functions that make the presets. An
  option has none if another flag has its name, or if it has another type in an earlier
  preset.
  """
  known, others = presets.PRESETS, {*FLAGS.values}
  kinds, owners = dict[str, Any](), dict[str, list[str]]()
  for preset, factory in known.items():
    try:
      signature = inspect.signature(factory, eval_str=True)
    except NameError:  # some types have names for type checkers only
      signature = inspect.signature(factory)
    for name, option in signature.parameters.items():
      kind = _kind(option.annotation)
      if name not in others and kinds.setdefault(name, kind) == kind:
        owners.setdefault(name, []).append(preset)
  options = {}
  for name, own in owners.items():
    if kinds[name] is None:
      continue
    factory = known[own[0]]
    default = inspect.signature(factory).parameters[name].default
    doc = inspect.getdoc(factory) or ''
    purpose = re.search(rf'^  {name}: (.*?)[.;](?!\S)', doc, re.M | re.S)
    help = f'Only for --preset={"|".join(own)}: '
    help += f'{" ".join(purpose[1].split())}; ' if purpose else ''
    flag = FLAGS.add(name, f'{help}{default} by default.', kinds[name])
    options[name] = _Option(flag, own)
  return options


def _kind(annotation: Any) -> Any:
  """Returns the type of the flag for an option, or its words; None for no flag."""
  if isinstance(annotation, types.UnionType):
    annotation = next(x for x in typing.get_args(annotation) if x is not type(None))
  elif typing.get_origin(annotation) is Literal:
    annotation = typing.get_args(annotation)
  is_flag = isinstance(annotation, tuple) or annotation in (bool, float, int, str)
  return annotation if is_flag else None


_OPTIONS = _define_options()


class PresetChoice(NamedTuple):
  """The choice of the flags.

  Attributes:
    name: name of the preset.
    options: its options.
    found: with --max_kl the result of the search.
    tokens: how many tokens of the text it used.
    target_size: greatest number of bytes of the file, in place of a step.
  """

  name: str
  options: dict[str, Any]
  found: steps.SearchResult | None = None
  tokens: int = 0
  target_size: int | None = None

  @property
  def keeps(self) -> str:
    return presets.make(self.name, **self.options).keeps


def read_choice(name: str, elements: int) -> PresetChoice:
  """Reads the preset and its options from the flags.

  Args:
    name: name of the preset that suits the checkpoint, if no flag names one.
    elements: how many elements the checkpoint has.

  Raises:
    ValueError: if two flags cannot be combined, if the config has an unknown field, or
      if a flag is for another preset.
  """
  values = {key: x.flag.value for key, x in _OPTIONS.items()}
  options = {key: x for key, x in values.items() if x is not None}
  max_kl, text, bits = _MAX_KL.value, _TEXT.value, _BITS.value
  target = program.parse_size('target_size', _TARGET_SIZE.value)
  of_near = _MAX_KL, _TARGET_SIZE, _BITS, _TEXT, _MAX_TOKENS
  given = [x.name for x in of_near if x.present]
  fields = FLAGS.fields(_CONFIG)
  if fields is not None:
    if options or given or _PRESET.value is not None:
      raise ValueError('--config cannot be combined with --preset or its options')
    fields.pop('experiment', None)  # `rotbits accounting` takes it
    if 'preset' not in fields:
      raise ValueError('--config has no field preset')
    choice = PresetChoice(fields.pop('preset'), fields)
    try:
      presets.make(choice.name, **fields)  # a field that is no option is an error
    except TypeError as error:  # a value of another type
      raise ValueError(f'--config: {error}') from error
    return choice
  name = _PRESET.value or name
  own = {key for key, x in _OPTIONS.items() if name in x.presets}
  own |= {x.name for x in of_near} if name == 'near' else set()
  for key in (*options, *given):
    if key not in own:
      raise ValueError(f'--{key} is not for --preset={name}')
  goals = [x for x in ('max_kl', 'target_size', 'bits') if x in given]
  if len(goals) > 1 or (goals and 'step' in options):
    others = [*goals[1:], *(['step'] if 'step' in options else [])]
    raise ValueError(f'--{goals[0]} finds the step: --{others[0]} cannot be given, too')
  if not goals and text is not None:
    raise ValueError('--text is for --max_kl, --target_size or --bits')
  if max_kl is not None and text is None:
    raise ValueError('--max_kl and --text are needed together')
  if text is None and _MAX_TOKENS.present:
    raise ValueError('--max_tokens is for --text')
  if not goals:
    return PresetChoice(name, options)
  if bits is not None and not bits <= 64:
    raise ValueError(f'--bits must be at most 64, got {bits}')
  # Checks, before the search, what is refused after it.
  for flag in (_BASE, _SAME_FILES):
    if flag.value:
      raise ValueError(f'--{flag.name} is not for --preset={name}')
  encode_lib.Output(
    _OUTPUT.value,
    inputs=[_CHECKPOINT.value],
    shard_size=program.parse_size('shard_size', _SHARD_SIZE.value),
    overwrite=_OVERWRITE.value,
  )
  found: steps.SearchResult | steps.Calibration | None = None
  if text is not None:
    opened = checkpoints.open_checkpoint(_CHECKPOINT.value)
    tokens = program.read_tokens(opened.files, opened.config, program.read_text(text))
    settings: Any = options | {
      'max_tokens': _MAX_TOKENS.value,
      'folder': outputs.resolved(_OUTPUT.value).parent,
      'progress': True,
    }
    if max_kl is None:
      found = steps.calibrate(opened, tokens, **settings)
    else:
      found = steps.search(opened, tokens, max_kl=max_kl, **settings)
    options |= {'offsets': found.offsets, 'inputs': found.inputs}
  if isinstance(found, steps.SearchResult):
    used = min(tokens.size, _MAX_TOKENS.value)
    return PresetChoice(name, options | {'step': found.step}, found, used)
  if bits is not None:
    target = int(bits * elements / 8)
  return PresetChoice(name, options, target_size=target)


def last_line(
  report: savings.Report, given: int, seconds: float, choice: PresetChoice
) -> str:
  """Returns the line with which the command ends.

  Args:
    report: the report on the file.
    given: bytes of the input.
    seconds: the time that it took.
    choice: the choice of the flags.
  """
  back = savings.BACK[report.keeps]
  if report.keeps == 'bits' and program.is_gguf(_CHECKPOINT.value):
    back = 'the weights come back as safetensors, quantised ones rounded to float16'
  if choice.found is not None:
    kl, step = f'{choice.found.kl:.2g}', choice.found.step
    back += f': KL {kl} nats on {choice.tokens:,} tokens, step 2^{step}'
  elif report.keeps == 'approximation':
    back += '; measure it with rotbits evaluate'
  elif report.needs:
    back += ', beside the same --base'
  sizes = f'{text_lib.of_bytes(given)} => {text_lib.of_bytes(report.file_bytes)}'
  name = text_lib.printable(_OUTPUT.value)
  share = report.file_bytes / max(given, 1)
  return f'{share:.2%} ({sizes}, {name}) in {seconds:.0f} s; {back}'


def main() -> program.Result | None:
  start = time.monotonic()
  shard_size = program.parse_size('shard_size', _SHARD_SIZE.value)
  if _DISTRIBUTED.value:
    _check_coordinator()
    jax.distributed.initialize(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
  else:
    for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
      if flag.present:
        raise ValueError(f'--{flag.name} is for --distributed')
  opened = checkpoints.open_tensors if _SAME_FILES.value else checkpoints.open_any
  status.show(f'encode: reading {text_lib.printable(_CHECKPOINT.value)} ...')
  source = opened(_CHECKPOINT.value)
  default = presets.default(getattr(source, 'config', None))
  choice = read_choice('exact' if _BASE.value else default, estimation.elements(source))
  name: Any = choice.name  # also those of other packages
  rotbits_jax.encode_to_file(
    source,
    _OUTPUT.value,
    preset=name,
    target_size=choice.target_size,
    base=_BASE.value,
    shard_size=shard_size,
    overwrite=_OVERWRITE.value,
    check=_VERIFY.value,
    progress=True,
    **choice.options,
  )
  if jax.process_index():
    return None
  report = rotbits_jax.inspect(outputs.resolved(_OUTPUT.value))
  reason = getattr(source, 'reason', None)
  result = report.to_json(verbose=FLAGS.verbose.value) | {
    'given_bytes': source.input_bytes,
    'left_out': list(source.left_out),
    'plain_because': reason,
    'curve': choice.found and [point._asdict() for point in choice.found.curve],
  }
  parts = [program.report_text(report, True), ''] if FLAGS.verbose.value else []
  if source.left_out:
    parts.append(program.printable(f'not kept: {", ".join(source.left_out)}'))
  if program.is_gguf(_CHECKPOINT.value):
    parts.append('the GGUF file itself does not come back: keep it for llama.cpp')
  elif choice.keeps == 'bits' and isinstance(source, checkpoints.CheckpointReader):
    assert source.path
    if '.bin' in source.path.suffixes:
      parts.append(
        'the weights come back as safetensors; with --same_files they come back in the '
        'files that they are in'
      )
  if checkpoints.ADAPTER_CONFIG in source.files:
    fits = 'fits' if choice.keeps == 'bits' else 'does not fit'
    parts.append(
      f'the folder holds an adapter ({checkpoints.ADAPTER_CONFIG}), which {fits} the '
      'decoded weights of its model'
    )
  if reason is not None:
    parts.append(program.printable(f'stored as plain tensors, because {reason}'))
  if _BASE.value and not report.needs:
    program.warn(f'{_OUTPUT.value} does not need the base: too little of it is alike')
  if report.file_bytes >= source.input_bytes:
    program.warn(
      f'{_OUTPUT.value} has {report.file_bytes:,} bytes, and the weights that were '
      f'given have {source.input_bytes:,}: keep those'
    )
  # The weights files may hold more than the tensors, and a GGUF file holds less.
  given = min(source.input_bytes or report.input_bytes, report.input_bytes)
  parts.append(last_line(report, given, time.monotonic() - start, choice))
  return result, '\n'.join(parts)


def _check_coordinator() -> None:
  """Raises a ValueError if --coordinator is given and is not HOST:PORT."""
  address = _COORDINATOR.value
  if address is None:
    return
  port = re.fullmatch(r'.+:([0-9]{1,5})', address)
  if port is None or not 0 < int(port[1]) < 1 << 16:
    raise ValueError(f'--coordinator must be HOST:PORT, got {address!r}')
