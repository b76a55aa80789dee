"""Decodes and checks everything in a file, and compares it with a checkpoint.

  rotbits verify SmolLM2-135M.rotbits --against=SmolLM2-135M

With --against, a file of `exact` must have the bits of the checkpoint. A file of `free`
or `paper` must compute its function: predictions for random tokens, and canonical forms
of tensors, may differ by a few times what random rotations and rounding cause. For
`near` the difference is measured; with --text, on the tokens that `encode --max_kl`
kept apart, where it must be what the file says.

JSON: the fields of `rotbits_jax.file.verification.Verification`.
"""

from absl import flags
import msgspec

import rotbits_jax
from rotbits_jax.cli import program
from rotbits_jax.file import reader

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
  if verified.same_bits:
    lines.append(f'all bits are those of {against}')
  if verified.kl is not None:
    floor = f'noise floor {verified.kl_rerounded:.3g}'
    lines.append(f'KL divergence from {against}: {verified.kl:.3g}, {floor}')
    count = f'{verified.compared} of {verified.tensors}'
    if verified.compared:
      lines.append(f'canonical forms of {count} tensors are those of {against}')
  if verified.measured is not None:
    lines.append(f'{verified.measured}, as the file says')
  return msgspec.to_builtins(verified._asdict()), '\n'.join(lines)
