"""Numbers to bits and back, in JAX, knowing neither models nor files.

In the order of reading:

    rans         the coder: a message of many lanes, push and pop
    tables       integer frequency tables
    codecs       the algebra: pairs (push, pop) and their combinators
    categorical  many symbols under few tables: the fast path
    weights/     arrays of weights as one stream of blocks, and back
    bits_back/   rotations and orders for free: bits-back coding
"""
