"""The encoded file: its format, its writer and its reader.

A record is a part of a model that decodes on its own: the embedding, a layer, the head.
A stream is a run of bytes in the file; each record is one stream.

The format:

container     stores streams in a safetensors file
manifest      describes the content of a file, and validates the description
leaves        the part of the manifest that describes parameters
shards        divides a model among several files, with an index
coders        finds the coder of records, or of a whole model, by its name

Writing:

sources       gives models, checkpoints and PyTrees one face: records
trees         turns PyTrees into nested dicts and back
job           the work of encoding a source: rewrites records, and writes them
writer        codes records and appends them to one file
journal       the hidden folder of a run, from which the next run resumes
encode        writes files, which appear when they are complete
estimation    estimates the sizes of files, from samples
sizing        finds the steps of `near` with which a file has a size

Reading:

reader        reads a record without the others, or the whole content
records       decodes one record, into given memory or into new memory
stacks        decodes layers straight into their places in a stack
sidecars      reads the other files of a checkpoint
memory        allocates memory for records, and refuses more than it can hold
placement     places decoded arrays on devices
directory     writes the checkpoint that a file holds
verification  compares a file with a source
"""

from rotbits_jax.file.container import ContainerError
from rotbits_jax.file.container import Readable
from rotbits_jax.file.placement import Place
from rotbits_jax.file.reader import Reader

__all__ = ['ContainerError', 'Place', 'Readable', 'Reader']
