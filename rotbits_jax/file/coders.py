"""Coders of the arrays of a record, by their names in files.

The coder of records is `coding.coder`. Another package registers its own:

    coders.register(coders.RecordCoder('zstd', Spec, encode, decode))
    rotbits_jax.encode(model, preset=presets.exact()._replace(coder='zstd'))
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.coding import coder
from rotbits_jax.coding import known
from rotbits_jax.coding import specs


class RecordCoder(NamedTuple):
  """Codes the arrays of a record as one stream of bytes.

  Attributes:
    name: name of the coder in files.
    spec: class of the spec of a stream: a schema dataclass, see `system.schema`. Like
      `specs.StreamSpec` it has `arrays`, each with its `shape`, `dtype` (a name) and
      `nbytes`; and `nbytes`, the length of the stream.
    encode: takes arrays, contiguous, and what the decoder will know of some, see
      `coder.encode`; returns an object with the attributes `spec` and `data`, the
      stream, uint8 `[n]`.
    decode: takes a spec, a stream, as `out` the arrays to decode into, and `known`, see
      `coder.decode`. It raises a ValueError if the stream or an array is damaged.
  """

  name: str
  spec: type[Any]
  encode: Callable[[Sequence[np.ndarray], Mapping[int, known.Known]], Any]
  decode: Callable[..., Any]


def register(coder: RecordCoder) -> RecordCoder:
  """Registers a coder under its name.

  Raises:
    ValueError: if another coder has this name.
  """
  if coder.name in _KNOWN:
    raise ValueError(f'a coder of the name {coder.name!r} exists already')
  _KNOWN[coder.name] = coder
  return coder


def find(name: str) -> RecordCoder | None:
  """Returns the coder of a name; None if none was registered."""
  return _KNOWN.get(name)


_KNOWN: dict[str, RecordCoder] = {
  'weights': RecordCoder('weights', specs.StreamSpec, coder.encode, coder.decode)
}
