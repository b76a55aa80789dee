r"""The coder: turns arrays into bytes and back, in JAX.

It knows neither models nor files. A *record* is a list of arrays that decodes on its
own, such as the arrays of one layer. Its *stream* is the bytes that stand for it.

    >>> import numpy as np
    >>> from rotbits_jax.coding import coder
    >>> array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    >>> encoded = coder.encode([array])
    >>> encoded.data.size < array.nbytes
    True
    >>> (decoded,) = coder.decode(encoded.spec, encoded.data)
    >>> np.array_equal(decoded, array)
    True

The bits of an element are divided into a *symbol*, which is worth modelling, and *raw
bits*, which are noise. A *layout* is the rule of this division for one dtype. A *unit*
is a byte, or a pair of neighbouring elements, which has one symbol or two. A frequency
table says how probable each symbol is. The *class* of a unit says which table codes it;
it follows from the scales of its row and column. An array may be coded relative to one
that both sides know. Arrays of one layout form a *group*, which shares tables, and its
units are cut into *blocks*. In a block, symbols are pushed onto a *message*, a stack of
several lanes that are coded side by side.

The way of an array of floats:

    statistics   which low bits are zero in all elements; whether it has many zeros
    scales       how large its rows and columns are
    models       which scales pay, which layout, and which arrays share tables
    plans        counts a sample of its bins, and makes frequencies of these
    contexts     serialises scales and frequencies
    blocks       pushes the symbols, and puts the raw bits into planes

In the order of reading:

    rans         the entropy coder: pushes symbols onto a message and pops them
    tables       integer frequency tables
    codecs       pairs of functions (push, pop)
    bits_back/   bits-back coding: rotations that cost no bits
    units        the base of layouts: units, and the tables of their symbols
    layouts      divides elements into symbols and raw bits
    blocks       codes up to 2^20 units in one message
    scales       measures rows and columns, and gives each element its class
    contexts     serialises scales and tables
    statistics   the low bits, zeros and codes of arrays
    models       chooses scales, layouts and groups of floats by their price
    plans        chooses how each array is stored
    specs        describes a stream, for the decoder
    coder        codes a record: the way through all of these
"""
