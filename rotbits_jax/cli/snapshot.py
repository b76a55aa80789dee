"""Decodes a file once, into a cache, and prints the folder.

  rotbits snapshot --input=FILE [--base=DIR|FILE]
    [--format=safetensors|slicegpt|transformers] [--dtype=float32|bfloat16|float16]
    [--json] [--verbose]

Example:

  vllm serve "$(rotbits snapshot --input=smollm2.rotbits)"

The folder is for programs that load a checkpoint: transformers, vLLM, MaxText, Tunix,
Keras. It is decoded when it is first asked for; afterwards the command only finds it.
Its name is a digest of the checksums in the file, the base, the format, the dtype and
the version of this program. Do not write into it.

A sliced model gets the format `transformers`, see `rotbits decode --help`; a dense one
is as it was encoded.

The cache is the folder that the variable ROTBITS_JAX_CACHE names, or `rotbits_jax` in
XDG_CACHE_HOME or in ~/.cache.

JSON:

  folder   the folder
"""

import typing

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.cli import program

FLAGS = program.Flags()
_INPUT = FLAGS.add('input', 'The file to decode.', source=True, required=True)
_BASE = FLAGS.bases()
_FORMAT = FLAGS.add(
  'format',
  'Format of the weights. By default a sliced model gets that of transformers.',
  typing.get_args(checkpoints.Format),
)
_DTYPE = FLAGS.add(
  'dtype',
  'Dtype of the weights. By default they have that of the encoded checkpoint.',
  program.DTYPES,
)


def main() -> program.Result:
  folder = rotbits_jax.snapshot(
    _INPUT.value,
    _BASE.value,
    format=_FORMAT.value,
    dtype=_DTYPE.value,
    progress=True,
  )
  return {'folder': str(folder)}, program.printable(str(folder))
