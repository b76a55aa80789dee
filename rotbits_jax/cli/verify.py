"""Decodes and checks everything in a file, and compares it with a checkpoint.

  rotbits verify SmolLM2-135M.rotbits --against=SmolLM2-135M

With --against a file of the preset `exact` must have the checkpoint's bits. One of
`free` or `paper` must have its function: the predictions for random tokens differ from
the checkpoint's by no more than a few times what a random rotation and rounding make.
For `near` the difference is measured, and any is accepted. For that both models are in
memory; everything else takes one layer at a time.

JSON: the fields of `rotbits_jax.file.verification.Verification`.
"""

import rotbits_jax
from rotbits_jax.cli import program

_BASE, _AGAINST = program.shared('base', 'against')


def main(file: str) -> program.Result:
  against = _AGAINST.value
  verified = rotbits_jax.verify(file, against=against, base=_BASE.value, progress=True)
  counts = f'{verified.tensors} tensors and {verified.files} other files'
  lines = [f'{file}: {counts} are undamaged']
  if verified.same_bits:
    lines.append(f'all bits are those of {against}')
  if verified.kl is not None:
    floor = f'noise floor {verified.kl_rerounded:.3g}'
    lines.append(f'KL divergence from {against}: {verified.kl:.3g}, {floor}')
  return verified._asdict(), '\n'.join(lines)
