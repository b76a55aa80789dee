r"""A unit of arrays of weights as one stream of bytes, and back.

A unit is a list of arrays that decodes on its own, such as the arrays of one layer. Its
stream is the bytes that stand for it in a file. These words are used throughout:

* A number is one entry of an array. Its bits are divided into a *symbol*, the bits that
  are worth modelling, and a *rest*, the bits that are noise. A *layout* is a rule for
  this division; it belongs to one dtype.
* A *line* is a row or a column of an array, taken as a matrix. A *class* stands for one
  standard deviation. Lines are sorted into classes; the *label* of a line is a small
  integer that tells its class. The classes of its row and its column determine the
  class of a number, and with it the frequency table of the number.
* A *lane* is one rANS coder. A *block* is up to 2^20 numbers, coded in n lanes that
  decode side by side.
* Exchanged lines are slices of arrays along an axis, such as the neurons of an MLP,
  whose order does not matter. They are stored in an order that saves bits.

The modules:

    divide numbers into symbols and rests              layouts, floats, integers
    sort the lines of an array into classes            scales
    find the frequency tables of classes               contexts
    do all this for the arrays of a unit               plans
    code the symbols and rests of a layout in blocks   blocks
    store rests as planes of bits                      planes
    choose the order of exchanged lines                order
    describe and code a unit                           specs, units

The decoder decides by integers only. Blocks are coded side by side in threads, and the
bytes do not depend on the number of threads.

The parts of the stream of a unit, in this order, are described below. Integers have
their low byte first. `specs.StreamSpec` holds the numbers that are needed to read it.

1.  For each layout, its model: the lines, labels and tables of the arrays of that
    layout, see `contexts.from_bytes`.
2.  For each group, its blocks. One group of a layout is the numbers of all its arrays
    without exchanged lines, one array after the other in C order. Another group is the
    numbers of its arrays with exchanged lines. All blocks of a group but the last have
    equally many numbers. Number i of a block is number i // n of lane i % n. A block
    with n lanes is

        uint32 [n]      the states after the last push
        uint16          the least number of words of a lane
        uint16          b = 1 or 2
        uint8 [n b]     the numbers of words minus the least one, b bytes each
        uint8 [n b % 2] 0
        uint16 [...]    the words, lane after lane, in the order in which they are read

    The decoder starts from the states and decodes the numbers of a lane in order. With
    the state x of the lane it computes

        slot = x mod 2^14
        symbol, start, frequency = the interval of the number's table that holds slot
        x = frequency * (x // 2^14) + slot - start
        if x < 2^16 and words are left: x = x * 2^16 + the next word

    After the last number no words are left and x = 0.
3.  If lines were exchanged, the remainder of the bytes that chose their order, see
    `order`.
4.  The noise. First come the rests of the groups without exchanged lines, as planes for
    each block, see `planes`. Then come the arrays without exchanged lines that are
    stored as they are, in C order. Then follow the rests and the arrays with exchanged
    lines in the same way. If lines were exchanged, the first `order.noise_size` bytes
    of the noise are missing, because they chose the order.
"""

from rotbits_jax.coding.weights.layouts import DTYPES
from rotbits_jax.coding.weights.layouts import Grid
from rotbits_jax.coding.weights.numbers import contiguous
from rotbits_jax.coding.weights.pool import Start
from rotbits_jax.coding.weights.pool import record_jobs
from rotbits_jax.coding.weights.pool import run
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
  'Grid',
  'Start',
  'StreamSpec',
  'contiguous',
  'decode',
  'encode',
  'estimate',
  'record_jobs',
  'run',
]
