r"""The coder: turns arrays of numbers into bits and back, in JAX.

The modules know neither models nor files. A *record* is a list of arrays that decodes
on its own, such as the arrays of one layer. Its *stream* is the bytes that stand for it
in a file.

    >>> import numpy as np
    >>> from rotbits_jax.coding import coder
    >>> array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    >>> encoded = coder.encode([array])
    >>> encoded.data.size < array.nbytes
    True
    >>> (decoded,) = coder.decode(encoded.spec, encoded.data)
    >>> np.array_equal(decoded, array)
    True

The bits of an element are divided into the bits that are worth modelling, of which a
*symbol* is made, and *raw bits*, which are noise. A *layout* is a rule for this
division; it belongs to one dtype. Floats are coded in pairs: two neighbours are one
symbol. A frequency table says how probable each symbol is. Which table codes an
element, its *class*, encoder and decoder know before: it follows from the scales of the
element's row and column, or from what both know of it. Symbols become a *message*, a
stack that is divided into lanes, which are coded side by side. In the order of reading:

    rans         the coder: pushes symbols onto a message and pops them
    tables       integer frequency tables
    codecs       codecs, which are pairs (push, pop), and functions that combine them
    bits_back/   bits-back coding: rotations that cost no bits
    layouts      divides elements into symbols and raw bits
    blocks       codes up to 2^20 elements
    contexts     the classes of elements and the tables of arrays
    statistics   chooses layouts of floats, and measures rows and columns
    sparse       arrays without their zeros
    plans        chooses how each array is stored
    specs        describes a stream
    coder        codes a record
    pool         the threads
"""
