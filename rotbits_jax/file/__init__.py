"""The encoded file: its format, its writer and its reader.

A record is a part of a model that decodes on its own: the embedding, a layer, the head.
A stream is a run of bytes in the file; each record is one stream.

The format:

container     stores streams in a safetensors file
manifest      describes the content of a file, and validates the description
shards        divides a model among several files, with an index
coders        finds the coder of records by its name

Writing:

sources       models, opened checkpoints and PyTrees: records that are read one by one
trees         turns PyTrees into nested dicts and back
encode        rewrites records, and codes them
writer        codes a record, and appends records to one file
output        a file, or a folder of shards, that appears at once
inputs        the files that no output may replace
estimate      sizes of files before they are written

Reading:

reader        reads a record without the others, or the whole content
decode        decodes records, into given memory or into new memory
stacks        reads records, and layers straight into their stacks
plain_model   makes a model of plain tensors
memory        bounds the memory of what is decoded
placement     places decoded arrays on devices
directory     writes the checkpoint that a file holds
verification  compares a file with a source
savings       the report on a file: the saving of each step, to the byte
report        the report as a web page
"""

from rotbits_jax.file.container import ContainerError
from rotbits_jax.file.container import Readable
from rotbits_jax.file.placement import Place
from rotbits_jax.file.reader import Reader

__all__ = ['ContainerError', 'Place', 'Readable', 'Reader']
