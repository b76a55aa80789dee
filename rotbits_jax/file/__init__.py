"""The encoded file: its format, its writer and its reader.

A record is a part of a model that decodes on its own: the embedding, a layer, the head.
A stream is a run of bytes in the file; each record is one stream.

container     stores streams in a safetensors file
manifest      describes the content of a file, and checks the description
shards        divides a model among several files, with an index
coders        finds the coder of records by its name
jobs          codes records in threads

In: sources (models, opened checkpoints and PyTrees) -> encode (rewrites records, and
codes them) -> output (a file, or a folder of shards, that appears at once).
`estimate` tells sizes before; `prices` tells whether `exact` stores a model smaller.

Out: reader (records to leaves and models, within `memory`) -> placement (devices), or
directory (a checkpoint), verification and report. Verification opens the other side
(originals) and compares tensors with it (comparison).
"""

from rotbits_jax.file.container import ContainerError as ContainerError
from rotbits_jax.file.container import Readable as Readable
from rotbits_jax.file.placement import Place as Place
from rotbits_jax.file.reader import Encoded as Encoded
from rotbits_jax.file.reader import Reader as Reader
