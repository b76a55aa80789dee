"""Bits-back coding of rotations.

If a choice does not matter, such as the rotation of a residual stream, the encoder
makes it by popping bits from the message. The decoder finds out the choice and pushes
the same bits back. So the choice costs no bits. `codecs.bits_back` does this for any
latent variable model.

**Symmetries.** Suppose that a group acts on y and that only the orbit of y matters.
Then x is the canonical element of the orbit, and z = y is an element of the orbit that
the encoder may choose:

    prior        the codec of y, as if there were no symmetry
    likelihood   y -> codecs.certain(canonical(y))
    posterior    x -> a codec of the elements of x's orbit, all equally probable

The message grows by the bits that y costs under the prior, minus log2 of the number of
elements in the orbit. The modules, which make codecs, in the order of reading:

    haar          rotations under the Haar measure, the uniform distribution
    eigen         rotations as eigenvectors of popped numbers, as published
    correction    exact integers from floats that were recovered inexactly
    codes         haar and eigen with corrections, behind one interface

`rotbits_jax.paper` codes a whole checkpoint with them.

Reference: J. He, G. Flamich, J. M. Hernandez-Lobato, arXiv 2410.01309.
"""
