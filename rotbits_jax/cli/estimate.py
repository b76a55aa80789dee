"""Estimates in a few seconds what each preset would take of a checkpoint.

  rotbits estimate PATH [--base=DIR|FILE] [--json] [--verbose]

Example:

  rotbits estimate SmolLM2-135M
  rotbits estimate TUNED --base=BASE

PATH is what `rotbits encode --checkpoint=PATH` takes. Only samples are read, and
nothing is written. The estimates come from the coder's own plans for these samples,
and for `free` and `near` from a small model that is cut out of the checkpoint and
rewritten. `near` is that of its default step. Times are those of two cores at the rates
of RESULTS.md.

JSON:

  bytes    bytes of the weights files, or of the tensors if these are fewer
  presets  list of objects: preset; bytes of the file that encode would write; about
           how many seconds that takes, and how many bytes of memory
  without  why there are no estimates of free and near, or null
"""

from rotbits_jax import checkpoints
from rotbits_jax.cli import program
from rotbits_jax.file import estimation
from rotbits_jax.system import status
from rotbits_jax.system import text as text_lib

FLAGS = program.Flags(first='checkpoint')
_CHECKPOINT = FLAGS.add(
  'checkpoint',
  'A directory with weights, or the weights file in it; the same as PATH.',
  source=True,
  required=True,
)
_BASE = FLAGS.bases()

_KEPT = {
  'exact': 'every bit',
  'exact --base': 'every bit, beside the base',
  'free': 'the function; not for LoRAs',
  'near': 'nearly the function',
}


def main() -> program.Result:
  status.show(f'estimate: reading {text_lib.printable(_CHECKPOINT.value)} ...')
  opened = checkpoints.open_any(_CHECKPOINT.value)
  given = min(opened.input_bytes, estimation.tensor_bytes(opened))
  found, without = estimation.estimate(opened, base=_BASE.value, progress=True)
  result = {
    'bytes': given,
    'presets': [
      {'preset': x.preset, 'bytes': x.nbytes, 'seconds': x.seconds, 'memory': x.memory}
      for x in found
    ],
    'without': without,
  }
  lines = [
    f'{"":13}{text_lib.of_bytes(given):>8}{"time":>15}{"memory":>9}  what comes back'
  ]
  is_gguf = program.is_gguf(_CHECKPOINT.value)
  kept = _KEPT | ({'exact': 'safetensors, rounded to float16'} if is_gguf else {})
  for own in found:
    lines.append(
      f'{own.preset:13}{text_lib.of_bytes(own.nbytes):>8}'
      f'{own.nbytes / max(given, 1):7.1%}{text_lib.of_seconds(own.seconds):>8}'
      f'{text_lib.of_bytes(own.memory):>9}  {kept[own.preset]}'
    )
  if _BASE.value is not None and not any('base' in x.preset for x in found):
    lines.append(
      'no exact --base: the model was sliced from the base, and only encode tells what '
      'that saves'
    )
  if without is not None:
    lines.append(f'no free and near: {text_lib.printable(without)}')
  return result, '\n'.join(lines)
