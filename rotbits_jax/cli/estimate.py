"""Estimates in a few seconds how small each preset would make a checkpoint.

  rotbits estimate --checkpoint=SmolLM2-135M
  rotbits estimate --checkpoint=TUNED --base=BASE

Only samples are read, and nothing is written. `near` is that of its default step. Times
are those of two cores at the rates of RESULTS.md.

JSON: bytes of the weights; presets, a list of objects: preset, bytes of the file, and
about how many seconds and bytes of memory that takes; without, why free and near lack.
"""

from rotbits_jax import checkpoints
from rotbits_jax.cli import program
from rotbits_jax.file import estimate as estimate_lib
from rotbits_jax.system import text as text_lib

_CHECKPOINT, _BASE = program.shared('checkpoint', 'base')

_KEPT = {
  'exact': 'every bit',
  'exact --base': 'every bit, relative to the base',
  'free': 'the function; not for LoRAs',
  'near': 'nearly the function',
}


def main() -> program.Result:
  source = checkpoints.open_any(_CHECKPOINT.value)
  input_bytes = min(source.input_bytes, estimate_lib.counts(source)[1])
  estimates, without = estimate_lib.estimate(source, base=_BASE.value, progress=True)
  size = text_lib.of_bytes
  lines = [f'{"":13}{size(input_bytes):>8}{"time":>15}{"memory":>9}  what comes back']
  for preset, nbytes, seconds, memory in estimates:
    lines.append(
      f'{preset:13}{size(nbytes):>8}{nbytes / max(input_bytes, 1):7.1%}'
      f'{text_lib.of_seconds(seconds):>8}{size(memory):>9}  {_KEPT[preset]}'
    )
  if without is not None:
    lines.append(f'no free and near: {without}')
  keys = 'preset', 'bytes', 'seconds', 'memory'
  presets = [dict(zip(keys, x, strict=True)) for x in estimates]
  result = {'bytes': input_bytes, 'presets': presets, 'without': without}
  return result, '\n'.join(lines)
