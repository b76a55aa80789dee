r"""The published scheme: bits-back coding of rotations, over a whole checkpoint.

A segment of a sliced model, see `models.config`, can be rotated without a change of the
function, if the parameters that read or write it are rotated, too. A shortcut is the
matrix that leads from one segment to the next. The rotations are the latents of
bits-back coding, see `coding.bits_back`.

All elements of the model are pushed onto one message, plain or entropy coded. Before
the parameters around a segment are pushed, a rotation T of the segment is *popped* from
the message and applied to them. The decoder finds the rotated parameters, recovers the
rotation from them, and pushes it back. With segments 0 .. S, the encoder does this:

    push the first columns of the embeddings        they pay for the first rotation
    for t = 0 .. S:
      pop T_t
      push, rotated: the shortcut that leads into segment t, the parameters that read
        it, and the parameters that write it (without the columns above)
      store the correction of T_t

The decoder does the inverse, from the end. The message and the model are in memory.

The canonicalizer decides from which parameters T is recovered, and so which matrix, the
frame, is sampled (see `symmetries.factorizations`):

* `svd` and `qr` recover T from a matrix W that reads the segment. Let W = C W_ref with
  the canonical rotation C. A rotation Q is sampled, and T = C Q^T. The stored matrix is
  T^T W = Q W_ref, so its canonical rotation is Q_hat.
* `polar_shortcut` recovers T from the shortcut M = [P 0] O that leads into the segment,
  where P is symmetric and O orthogonal. Let T_{t+1} = O^T (T_t + I) Z, where T_t + I is
  block diagonal. The stored shortcut is T_t^T M T_{t+1} = [T_t^T P T_t, 0] Z. Its polar
  factor is the first rows of Z. Only these rows are sampled, as a frame of orthonormal
  vectors. The first segment is recovered as by `qr`, and so is a segment that is
  narrower than the one before it.

The frame is sampled by one of two codes: `haar`, under the Haar measure, and
`symmetric_eig`, as eigenvectors of a symmetric matrix, as published. A segment is not
sampled if its rotation cannot be recovered, or if that gains nothing.

**Exactness.** The decoder recovers a rotation by a factorisation in float32, whose
rounding errors differ between machines. Therefore the encoder factorises the matrix a
second time, after a change as large as the backward error of a factorisation, and the
margins of `bits_back.correction` cover the difference. Beyond the margin a machine
decodes other elements, and their digests differ.

**The streams** are stacks of uint16 words. `message` holds the arrays in the order in
which they were pushed; if they are entropy coded, those of a segment are one stream of
`coding.coder`. To sample a rotation, the encoder makes a rANS message of popped words,
and pushes the rest of that message. `corrections` has the residues of each
sampled segment, and then a stream of `coding.coder` with the other arrays of the
correction. It is apart from the words from which the next rotation is sampled, because
a threshold leaves errors in these.

Reference: J. He, G. Flamich, J. M. Hernandez-Lobato, Getting Free Bits Back from
Rotational Symmetries in LLMs, arXiv 2410.01309, section 3.
"""

from rotbits_jax.paper.decoder import decode as decode
from rotbits_jax.paper.encoder import encode as encode
from rotbits_jax.paper.encoder import refuse as refuse
from rotbits_jax.paper.layout import STREAMS as STREAMS
from rotbits_jax.paper.layout import Canonicalizer as Canonicalizer
from rotbits_jax.paper.layout import CorrectionMethod as CorrectionMethod
from rotbits_jax.paper.layout import MessageLayout as MessageLayout
from rotbits_jax.paper.layout import Options as Options
from rotbits_jax.paper.layout import RotationCodec as RotationCodec

CODER = 'paper'
"""The coder of a preset that stores a model by the scheme, in place of records."""
