"""Estimates, from samples, how small each preset would make a checkpoint.

  rotbits estimate SmolLM2-135M

Nothing is written. `near` is estimated for its default step.

JSON: bytes of the weights; presets, the bytes of the file by preset; without, why free
is not among them.
"""

from typing import Any

import tqdm

from rotbits_jax import checkpoints
from rotbits_jax import presets
from rotbits_jax.cli import program
from rotbits_jax.file import estimate as estimate_lib
from rotbits_jax.file import report as report_lib

_LEAST_GAIN = 0.99  # share of the bytes of `exact` below which `free` is worth it


def main(checkpoint: str) -> program.Result:
  source: Any = checkpoints.open_any(checkpoint)
  input_bytes = min(source.input_bytes, source.nbytes)
  estimated = estimate_lib.estimate(source, progress=True)
  without = None if source.config else source.reason or 'it is of no known family'
  size = lambda count: tqdm.tqdm.format_sizeof(count, 'B')
  lines = [f'{"":13}{size(input_bytes):>8}']
  for preset, nbytes in estimated.items():
    share = nbytes / max(input_bytes, 1)
    kept = report_lib.BACK[presets.make(preset).keeps]
    if preset == 'free' and nbytes > _LEAST_GAIN * estimated['exact']:
      kept = 'the same as exact: use that'
    lines.append(f'{preset:13}{size(nbytes):>8}{share:7.1%}  {kept}')
  if without is not None:
    lines.append(f'no free: {without}')
  result = {'bytes': input_bytes, 'presets': estimated, 'without': without}
  return result, '\n'.join(lines)
