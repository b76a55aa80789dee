"""Pure functions of the symmetries of a transformer's weights.

A symmetry is a change of the weights that does not change the function of the model. A
*gauge* is a choice among the weights that a symmetry connects, and a rule *fixes* it.
These functions take and return arrays, work under `jit` and `vmap`, and do not wait for
the device. `passes` applies them to models that are larger than it.

The modules, in the order of reading:

    rotations       the residual stream in other coordinates
    factorizations  canonical forms under rotations: polar, QR, SVD
    heads           the bases and biases of attention heads; low-rank factors
    layer           one layer: gauge, fold norms, rotate, fix
    canonicalize    all layers in one call: the `vmap` of `layer`
    steps           rounding to multiples of a step, also with error feedback
    least_squares   linear images and orthonormal bases, on the host
    products        matrix products whose rounding does not depend on threads
"""

from rotbits_jax.symmetries.canonicalize import Gauges as Gauges
from rotbits_jax.symmetries.canonicalize import canonicalize as canonicalize
from rotbits_jax.symmetries.factorizations import Polar as Polar
from rotbits_jax.symmetries.factorizations import polar as polar
from rotbits_jax.symmetries.factorizations import qr as qr
from rotbits_jax.symmetries.factorizations import svd as svd
from rotbits_jax.symmetries.heads import basis as basis
from rotbits_jax.symmetries.heads import fix_keys as fix_keys
from rotbits_jax.symmetries.heads import fix_low_rank as fix_low_rank
from rotbits_jax.symmetries.heads import fix_values as fix_values
from rotbits_jax.symmetries.layer import fold_norm_scales as fold_norm_scales
from rotbits_jax.symmetries.rotations import rotate as rotate
