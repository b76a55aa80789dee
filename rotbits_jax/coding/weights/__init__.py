r"""A record of arrays of weights as one stream of bytes, and back.

A record is a list of arrays that decodes on its own, such as the arrays of one layer.
Its stream is the bytes that stand for it in a file.

    >>> import numpy as np
    >>> array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    >>> encoded = encode([array])
    >>> encoded.data.size < array.nbytes
    True
    >>> (decoded,) = decode(encoded.spec, encoded.data)
    >>> np.array_equal(decoded, array)
    True

The bits of an element are divided into a *symbol*, the bits that are worth modelling,
and *raw bits*, which are noise. A *layout* is a rule for this division; it belongs to
one dtype. The rows and columns of an array are sorted into *scale buckets*. The buckets
of its row and its column determine the frequency table of an element. Arrays that carry
less than they hold, such as pruned ones, are coded as other arrays, their *parts*. The
modules, in the order of reading:

    layouts    divides elements into symbols and raw bits
    forms      arrays as other arrays: multiples of a unit, codebooks, halves
    line_sums  sums of rows and columns
    scales     sorts rows and columns into scale buckets
    contexts   the frequency tables of a group of arrays
    blocks     codes up to 2^20 elements of a group
    plans      chooses how each array is stored
    specs      describes a stream
    streams    codes a record
    pool       the threads

Another layout is another file: it has to split elements, to join them, and to say which
magnitudes a symbol stands for.

The decoder decides by integers only. Blocks are coded side by side in threads, and the
bytes do not depend on the number of threads.

**The stream.** The parts of one layout form a *group*; if they need too many frequency
tables, they form several. The stream has, in this order:

1.  For each group, its contexts, see `contexts.from_bytes`.
2.  For each group, its blocks. The elements of a group are those of its parts, one part
    after the other in C order. All its blocks but the last have equally many elements.
    A block is a message, see `rans.split_words`, and then the planes of the raw bits,
    see `blocks`.
3.  The parts that are stored as they are, in C order.

`specs.StreamSpec` has the numbers that are needed to read it.
"""

from rotbits_jax.coding.weights.forms import Uniform
from rotbits_jax.coding.weights.pool import Run
from rotbits_jax.coding.weights.pool import Start
from rotbits_jax.coding.weights.pool import in_turn
from rotbits_jax.coding.weights.pool import record_jobs
from rotbits_jax.coding.weights.pool import run
from rotbits_jax.coding.weights.specs import DTYPES
from rotbits_jax.coding.weights.specs import ArraySpec
from rotbits_jax.coding.weights.specs import StreamSpec
from rotbits_jax.coding.weights.streams import Encoded
from rotbits_jax.coding.weights.streams import decode
from rotbits_jax.coding.weights.streams import encode
from rotbits_jax.coding.weights.streams import estimate

__all__ = [
  'DTYPES',
  'ArraySpec',
  'Encoded',
  'Run',
  'Start',
  'StreamSpec',
  'Uniform',
  'decode',
  'encode',
  'estimate',
  'in_turn',
  'record_jobs',
  'run',
]
