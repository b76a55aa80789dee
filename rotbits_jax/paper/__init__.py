r"""The published scheme: rotations by bits-back coding, over a whole checkpoint.

All numbers of the model go onto one message, as they are or entropy coded. Before the
parameters around a residual segment are pushed, a rotation of the segment is *popped*
from the message and applied; the decoder, which finds the rotated parameters, recovers
the rotation from them and pushes it back. With segments 0 .. S:

    push the first columns of the embeddings        they pay for the first rotation
    for t = 0 .. S:
      pop T_t
      push the shortcut that leads into segment t, what reads it and what writes it (but
      the columns above), rotated; push the correction of T_t

and the decoder does the inverse from the end. Both hold the parameters of a segment,
and never the model. How T is parametrised depends on what it is recovered from
(`symmetries.canonical`):

* `svd`, `qr`: from a matrix W that reads the segment: W = C W_ref, T = C Q^T with Q
  sampled, so the stored T^T W is Q W_ref, and Q_hat its canonical rotation.
* `polar_shortcut`: from the shortcut M = [P 0] O that leads into the segment:
  T_{t+1} = O^T (T_t + I) Z, so the stored T_t^T M T_{t+1} is [T_t^T P T_t, 0] Z, whose
  polar factor is the first rows of Z. Only these are sampled (a Stiefel frame). The
  first segment, and one narrower than that before it, is recovered as by `qr`.

The rotation is sampled by one of two codes: `haar`, exactly uniform, or
`symmetric_eig`, the eigenvectors of a matrix of numbers, as published. A segment whose
rotation cannot be recovered, or only at a loss, or whose bits the message does not
hold yet, is not sampled.

The rotated model is decoded bit for bit, checked by a digest of each array.

**The streams.** `message`, uint16: the words of a stack (`bits_back.word_stack`) from
the bottom up, then the window over it (`rans.to_words`), if any rotation was sampled.
The stack holds arrays in the order in which they are pushed (`segments.parts`; C
order, as `bits_back.numbers` writes them). To sample the rotation of segment t,
`rows[t]` rows are moved from the top of the stack to the bottom of the window (the
first time, one more, for the states); so these words are not in the stream where they
were pushed, but come back when the rotation does. `corrections`, uint16: another stack
with a block for each sampled segment. `tables`: the frequency tables of the segments in
order, of each the arrays' (if entropy coded) and then the correction's.

    options   read the parts of the scheme, and which frame stands for each segment
    segments  the parameters around each segment
    rotations how they are rotated, and the rotation is recovered
    layout    what a decoder must know, validated
    encoder
    decoder

Reference: J. He, G. Flamich, J. M. Hernandez-Lobato, Getting Free Bits Back from
Rotational Symmetries in LLMs, arXiv 2410.01309, section 3.
"""

from rotbits_jax.paper.decoder import decode
from rotbits_jax.paper.encoder import Encoded
from rotbits_jax.paper.encoder import encode
from rotbits_jax.paper.encoder import refuse
from rotbits_jax.paper.options import Options
from rotbits_jax.paper.segments import Source

__all__ = ['Encoded', 'Options', 'Source', 'decode', 'encode', 'refuse']
