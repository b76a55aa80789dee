"""Coders of the arrays of a record, by their names in files.

The coder of records is `coding.coder`. Another package adds its own:

    coders.CODERS['zstd'] = coders.RecordCoder(Spec, encode, decode)
    rotbits_jax.encode(model, preset=presets.exact()._replace(coder='zstd'))
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.coding import coder
from rotbits_jax.coding import specs


class RecordCoder(NamedTuple):
  """Codes the arrays of a record as one stream of bytes.

  The spec of a stream is a `schema.Object`. Like `specs.StreamSpec` it has `nbytes` and
  `arrays`, each with its `shape`, `dtype` (a name) and `nbytes`. The functions are as
  `coder.encode`, whose result has `spec` and `pieces`, and `coder.decode`, which raises
  a ValueError if the stream or an array is damaged.
  """

  spec: type[Any]
  encode: Callable[[Sequence[np.ndarray], Mapping[int, Any]], Any]
  decode: Callable[..., Any]


CODERS = {'weights': RecordCoder(specs.StreamSpec, coder.encode, coder.decode)}
