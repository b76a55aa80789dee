"""Decodes a file to a checkpoint.

  rotbits decode SmolLM2-135M.rotbits SmolLM2-again

Tensors keep their names, shapes, dtypes and shards, and the other files (configs,
tokenizer, license, model card, code) come back, too. FILE may be a folder of shards, or
their index. The default FOLDER is FILE without its ending. A file that was encoded with
--base needs the same --base. Memory holds a few layers at a time.

A sliced model loads in Microsoft's SliceGPT with --format=slicegpt, and in transformers
with --format=transformers, which also writes the code of the model:

  AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

This runs Python files in FOLDER, so those of FILE are left out, unless --code is given.

JSON: folder; sliced, whether the model is sliced, null for plain tensors.
"""

import typing

from absl import flags

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.cli import program

_BASE, _OVERWRITE = program.shared('base', 'overwrite')
_FORMAT = flags.DEFINE_enum(
  'format', 'safetensors', typing.get_args(checkpoints.Format), 'Format of the weights.'
)
_SHARD_SIZE = flags.DEFINE_string('shard_size', None, 'Size of a file, like 2GB.')
_CODE = flags.DEFINE_bool('code', False, 'Write the Python files of FILE.')
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16', 'float16'], 'Default: as encoded.'
)


def main(file: str, folder: str | None = None) -> program.Result:
  target = folder or file.removesuffix('.rotbits')
  reader = rotbits_jax.file.Reader(file, base=_BASE.value)
  rotbits_jax.decode_to_directory(
    reader,
    target,
    format=typing.cast(checkpoints.Format, _FORMAT.value),
    shard_size=program.parse_size(_SHARD_SIZE),
    dtype=_DTYPE.value,
    code=_CODE.value,
    overwrite=_OVERWRITE.value,
    progress=True,
  )
  sliced = None if reader.config is None else reader.config.sliced
  text = f'wrote {target}'
  if sliced and _FORMAT.value == 'safetensors':
    text += '\nThe model is sliced; to load it in transformers: --format=transformers'
  return {'folder': target, 'sliced': sliced}, text
