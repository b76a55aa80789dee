"""Decodes and checks everything in a file, and compares it with its input.

  rotbits verify SmolLM2-135M.rotbits --against=SmolLM2-135M

--against takes a checkpoint, another encoded file or a folder of shards. A file of
`exact` must have its bits. A file of `free` or `paper` must compute its function:
predictions for random tokens, and canonical forms of tensors, may differ by a few times
what random rotations and rounding cause. For `near` the rounding is that to its steps;
in plain tensors each element must be within the error that its step allows. With
--text, the loss is measured on the tokens that `encode --max_kl` kept apart, where it
must be what the file says. The exit code is 2 if anything differs, or if the folder has
files that the file does not store, unless `encode --exclude` left them out.

JSON: the fields of `rotbits_jax.file.verification.Verification`.
"""

from absl import flags
import msgspec

import rotbits_jax
from rotbits_jax.cli import program
from rotbits_jax.file import reader
from rotbits_jax.file import verification

_BASE, _AGAINST = program.shared('base', 'against')
_TEXT = flags.DEFINE_string('text', None, 'The text of `encode --max_kl`.')


def main(file: str) -> program.Result:
  against, tokens = _AGAINST.value, None
  if _TEXT.value is not None:
    files = reader.Reader(file, base=_BASE.value).files()
    tokens = program.read_tokens(_TEXT.value, files)
  verified = rotbits_jax.verify(
    file, against=against, tokens=tokens, base=_BASE.value, progress=True
  )
  counts = f'{verified.tensors} tensors and {verified.files} other files'
  lines = [f'{file}: {counts} are undamaged']
  if against is not None:
    lines += _comparison(verified, against)
  lines += [
    f'NOT STORED: {name} (keep the original of these)' for name in verified.missed
  ]
  values, text = msgspec.to_builtins(verified._asdict()), '\n'.join(lines)
  return program.Failed(values, text) if verified.missed else (values, text)


def _comparison(verified: verification.Verification, against: str) -> list[str]:
  """Returns how tensors were compared, a line for each way."""
  lines = []
  counts = {way: count.tensors for way, count in verified.ways.items() if count.tensors}
  total = sum(counts.values())
  for way, count in counts.items():
    if way == 'bits':
      lines.append(f'{count} of {total} tensors have the bits of {against}')
    elif way == 'step':
      lines.append(f'{count} of {total} tensors are within a step of {against}')
    elif way == 'form':
      lines.append(f'canonical forms of {count} of {total} tensors fit {against}')
    else:
      lines.append(f'{count} of {total} tensors were not compared with {against}')
  if verified.worst is not None:
    worst = verified.worst
    lines.append(
      f'the greatest error: {worst.path}: {worst.error:.3g} of its root mean square '
      f'(its step allows {worst.bound:.3g})'
    )
  if verified.kl is not None:
    floor = f'noise floor {verified.kl_rerounded:.3g}'
    lines.append(f'KL divergence from {against}: {verified.kl:.3g}, {floor}')
  if verified.measured is not None:
    lines.append(f'{verified.measured}, as the file says')
  lines.append(f'{verified.files_compared} other files have the bits of {against}')
  return lines
