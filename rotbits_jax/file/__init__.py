"""The encoded file: its format, its writer and its reader.

A unit is a part of a model that decodes on its own: the embedding, a layer, the head. A
stream is a run of bytes in the file; each unit is one stream.

container  stores streams in a safetensors file
fields     reads JSON objects from untrusted files
manifest   describes the content of a file, and validates the description
writer     writes a model to one file or to shards, one unit at a time
reader     reads a unit without the others, or the whole model
report     tells what each step of the encoder saved
"""

from rotbits_jax.file.container import ContainerError
from rotbits_jax.file.container import Readable
from rotbits_jax.file.reader import Place
from rotbits_jax.file.reader import Reader
from rotbits_jax.file.report import Report

__all__ = ['ContainerError', 'Place', 'Readable', 'Reader', 'Report']
