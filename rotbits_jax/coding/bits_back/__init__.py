"""Bits-back coding of rotations.

If a choice does not matter, such as the rotation of a residual stream, the encoder
makes it by popping bits from the message. The decoder finds out the choice and pushes
the same bits back. So the choice costs no bits. `codecs.bits_back` does this for any
latent variable model. With a symmetry, the latent z is an element of an orbit, and x is
its canonical element, so that the likelihood is `codecs.certain(canonical(z))` and the
posterior is uniform on the orbit. The modules, in the order of reading:

    haar          rotations under the Haar measure, the uniform distribution
    eigen         rotations as eigenvectors of popped numbers, as published
    correction    exact integers from floats that were recovered inexactly
    codes         haar and eigen with corrections, behind one interface

`rotbits_jax.paper` codes a whole checkpoint with them.

Reference: J. He, G. Flamich, J. M. Hernandez-Lobato, arXiv 2410.01309.
"""
