"""The file: what is written, and what is read.

container  streams of bytes in a safetensors file
fields     JSON that a stranger may have written
manifest   what the file holds, as types that check themselves
writer     a model, a unit at a time, to one file or shards
reader     any unit without the others, or the whole model
report     where the bytes went
"""

from rotbits_jax.file.container import ContainerError
from rotbits_jax.file.container import Readable
from rotbits_jax.file.reader import Place
from rotbits_jax.file.reader import Reader
from rotbits_jax.file.report import Report

__all__ = ['ContainerError', 'Place', 'Readable', 'Reader', 'Report']
