"""Bits-back coding of rotations.

If a choice does not matter, such as the rotation of a residual stream, the encoder
makes it by popping bits from the message. The decoder recovers the choice and pushes
the same bits back, so the choice costs no bits; see `docs/mathematics.md`. In terms of
latent variable models: given their rotation, the weights have the likelihood 1, and the
posterior of the rotation is uniform. The modules, in the order of reading:

    haar          rotations under the Haar measure, the uniform distribution
    eigen         rotations as eigenvectors of a popped matrix, as published
    correction    exact integers from floats that were recovered inexactly
    codes         haar and eigen with corrections, behind one interface

`rotbits_jax.paper` codes a whole checkpoint with them.

Reference: J. He, G. Flamich, J. M. Hernandez-Lobato, arXiv 2410.01309.
"""
