"""Decodes a file once, into a cache, and prints the folder.

  rotbits snapshot --input=FILE [--base=DIR|FILE]
    [--format=safetensors|slicegpt|transformers] [--dtype=float32|bfloat16|float16]
    [--limit=50GB] [--json] [--verbose]
  rotbits snapshot --limit=50GB

Example:

  vllm serve "$(rotbits snapshot --input=smollm2.rotbits)"

The folder is for programs that load a checkpoint: transformers, vLLM, MaxText, Tunix,
Keras. It is decoded when it is first asked for; afterwards the command only finds it.
Its name follows from the checksums in the file, the base, the format, the dtype and the
version of this program. Processes that ask for one at the same time decode it once. Do
not write into it.

A sliced model gets the format `transformers`, see `rotbits decode --help`; a dense one
is as it was encoded.

With --limit, snapshots that were not used for the longest time are removed until the
others take at most so many bytes, but never the one that is printed, nor one that is
being written. Without --input nothing else is done: --limit=1KB removes them all.

The cache is the folder that the variable ROTBITS_JAX_CACHE names, or `rotbits_jax` in
XDG_CACHE_HOME or in ~/.cache.

JSON:

  folder   the folder; null without --input
  bytes    bytes of the files in it; null without --input
  removed  list of the folders that were removed
"""

import typing

from absl import flags

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.cli import program
from rotbits_jax.system import cache

FLAGS = program.Flags()
_INPUT = FLAGS.add('input', 'The file to decode.', source=True)
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
_LIMIT = FLAGS.add('limit', 'Greatest size of all snapshots, like 50GB.')


def main() -> program.Result:
  limit = program.parse_size('limit', _LIMIT.value)
  folder, removed = None, []
  if _INPUT.value is not None:
    folder = rotbits_jax.snapshot(
      _INPUT.value,
      _BASE.value,
      format=_FORMAT.value,
      dtype=_DTYPE.value,
      progress=True,
    )
  elif limit is None:
    raise flags.Error('--input=... is missing')
  if limit is not None:
    removed = cache.prune(limit, keep=folder)
  result = {
    'folder': None if folder is None else str(folder),
    'bytes': None if folder is None else cache.nbytes(folder),
    'removed': [str(path) for path in removed],
  }
  text = f'removed {len(removed)} snapshots' if folder is None else str(folder)
  return result, program.printable(text)
