"""The encoded file: its format, its writer and its reader.

A unit is a part of a model that decodes on its own: the embedding, a layer, the head. A
stream is a run of bytes in the file; each unit is one stream.

container         stores streams in a safetensors file
fields            reads JSON objects from untrusted files
manifest          describes the content of a file, and validates the description
shards            divides a model among several files, with an index
model             the job of encoding a model: rewrites layers, writes units
plain             the job of encoding a PyTree, or a checkpoint of an unknown family
packing           finds arrays whose numbers carry less than their dtype allows
writer            writes one file or several, one unit at a time
reader            reads a unit without the others, or the whole model
units             decodes one unit, into given arrays or into new ones
stacks            decodes layers straight into their places in a stack
messages          reads the message on which the preset `paper` has a whole model
checkpoint_files  reads the files of a checkpoint, and what is between its tensors
memory            refuses what memory cannot hold, before it is allocated
placement         places decoded arrays on devices
"""

from rotbits_jax.file.container import ContainerError
from rotbits_jax.file.container import Readable
from rotbits_jax.file.placement import Place
from rotbits_jax.file.reader import Reader

__all__ = ['ContainerError', 'Place', 'Readable', 'Reader']
