"""Bits-back coding of rotations and of row orders.

If a choice does not matter, such as the order of an MLP's neurons, the encoder makes it
by popping bits from the message. The decoder finds out the choice and pushes the same
bits back. So the choice costs no bits. In the order of reading:

    bits_back        the idea: a codec made from a latent variable model
    permutation      the order of rows, which the decoder finds by sorting
    haar             rotations under the Haar measure, the uniform distribution
    symmetric_eig    rotations as eigenvectors of popped numbers, as published
    correction       exact integers from floats that were recovered inexactly
    rotation_codes   haar and symmetric_eig with corrections, behind one interface
    word_stack       a stack of words that may be longer than memory

`bits_back`, `permutation`, `haar`, `symmetric_eig` and `correction` make codecs (see
`coding.codecs`) and can be used by themselves. `rotbits_jax.paper` needs the other
modules to code a whole checkpoint.
"""
