"""Bits-back coding: codecs of rotations and of orders, and the combinator.

In the order of reading:

    bits_back        a codec from a latent variable model: the idea, in a few lines
    permutation      the order of rows, found again by sorting
    haar             rotations under the Haar measure
    symmetric_eig    rotations as eigenvectors of popped numbers, as published
    correction       exact integers from floats that were recovered inexactly
    rotation_codes   haar and symmetric_eig behind one interface, corrections included
    word_stack       a message that is longer than memory, and a window over it
    numbers          arrays of numbers on such a message

`bits_back`, `permutation`, `haar`, `symmetric_eig` and `correction` make codecs (see
`coding.codecs`) and can be used by themselves; the others are what a whole checkpoint
needs on top (`rotbits_jax.paper`).
"""
