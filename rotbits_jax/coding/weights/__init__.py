r"""A unit of arrays of weights as one stream of bytes, and back.

    array -> symbols, which are modelled, and rests, which are noise     layouts
    lines of an array -> classes of scale                                scales
    classes -> frequency tables                                          contexts
    all this for the arrays of a unit                                    plans
    the symbols of a layout -> blocks of rANS lanes                      blocks
    rests -> planes of bits                                              planes
    the order of exchangeable lines, for free                            order
    spec and stream of a unit                                            specs, units

Integers make all the decoder's decisions. Blocks are coded side by side in threads, and
the bytes do not depend on how many there are.

The stream of a unit, in this order; `specs.UnitSpec` holds what is not in it. Integers
have their low byte first.

1.  For each layout (numbers of one dtype that divide alike into symbols and rests), its
    model: lines, labels and tables of the arrays of that layout, see
    `contexts.from_bytes`.
2.  For each group, its blocks. For each layout, a group is the numbers of all its
    arrays, one after the other in C order, and another group is those of its arrays
    with exchanged lines. All blocks of a group have as many numbers, but for the last.
    Number i of a block is number i // n of lane i % n. A block of n lanes is

        uint32 [n]      the states after the last push
        uint16          the least count of words of a lane
        uint16          b = 1 or 2
        uint8 [n b]     the counts of words, less the least one, b bytes each
        uint8 [n b % 2] 0
        uint16 [...]    the words, lane after lane, in the order in which they are read

    and a lane's numbers are decoded from its state x, from the first on, by

        slot = x mod 2^14
        symbol, start, frequency = the interval of the number's table that holds slot
        x = frequency * (x // 2^14) + slot - start
        if x < 2^16 and words are left: x = x * 2^16 + the next word

    so that in the end no words are left and x = 0.
3.  If lines were exchanged, what is left of the bytes that chose their order, see
    `order`.
4.  The noise: for each group without exchanged lines, for each block, the planes of its
    rests, see `planes`; the arrays without exchanged lines that are stored as they are,
    in C order; then the same of those with exchanged lines. The first bytes of the
    noise, `order.noise_size`, are missing where they chose an order.
"""

from rotbits_jax.coding.weights.pool import Start
from rotbits_jax.coding.weights.pool import unit_jobs
from rotbits_jax.coding.weights.specs import ArraySpec
from rotbits_jax.coding.weights.specs import UnitSpec
from rotbits_jax.coding.weights.units import Encoded
from rotbits_jax.coding.weights.units import decode
from rotbits_jax.coding.weights.units import encode

__all__ = [
  'ArraySpec',
  'Encoded',
  'Start',
  'UnitSpec',
  'decode',
  'encode',
  'unit_jobs',
]
