"""Coders by their names in files: of the arrays of a record, or of a whole model.

The coder of records is `coding.weights`. Another package registers its own:

    coders.register(coders.RecordCoder('zstd', Spec, encode, decode))
    rotbits_jax.encode(model, preset=presets.exact()._replace(coder='zstd'))
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.coding import weights


class RecordCoder(NamedTuple):
  """Codes the arrays of a record as one stream of bytes.

  Attributes:
    name: name of the coder in files.
    spec: class of the spec of a stream: a schema dataclass, see `system.schema`. Like
      `weights.StreamSpec` it has `arrays`, each with its `shape`, `dtype` (a name) and
      `nbytes`; `nbytes`, the length of the stream; and the method `grid` of one of
      `arrays`, which may always return None.
    encode: takes arrays, contiguous; returns an object with the attributes `spec` and
      `data`, the stream, uint8 `[n]`.
    decode: takes a spec, a stream, and as `out` the arrays to decode into. It raises a
      ValueError if the stream or an array is damaged.
  """

  name: str
  spec: type[Any]
  encode: Callable[[Sequence[np.ndarray]], Any]
  decode: Callable[..., Any]


class ModelCoder(NamedTuple):
  """Codes a whole model as one message: several streams of 16-bit words.

  Attributes:
    name: name of the coder in files.
    streams: names of the streams. The first may be longer than memory.
    options: class of the coder's options, which are those of the preset; a schema
      dataclass.
    refuse: takes a source; raises a ValueError if its model cannot be coded.
    encode: takes a source, the options, and a function that takes the words of the
      first stream, piece after piece; returns the layout (JSON values), the other
      streams by name, and the saving, see `paper.EncodedModel`.
    decode: takes the options, the layout, the streams by name and the config; yields
      the parameters as pairs (path, array).
    dtypes: takes the layout; returns the dtype of each parameter by path.
  """

  name: str
  streams: tuple[str, ...]
  options: type[Any]
  refuse: Callable[[Any], None]
  encode: Callable[..., Any]
  decode: Callable[..., Iterator[tuple[str, np.ndarray]]]
  dtypes: Callable[[Any], Mapping[str, np.dtype]]


Coder = RecordCoder | ModelCoder


def register(coder: Coder) -> Coder:
  """Registers a coder under its name.

  Raises:
    ValueError: if another coder has this name.
  """
  if coder.name in _KNOWN:
    raise ValueError(f'a coder of the name {coder.name!r} exists already')
  _KNOWN[coder.name] = coder
  return coder


def find(name: str) -> Coder | None:
  """Returns the coder of a name; None if there is none."""
  if name == 'paper' and name not in _KNOWN:
    register(_paper())  # its linear algebra is slow to import
  return _KNOWN.get(name)


_KNOWN: dict[str, Coder] = {
  'weights': RecordCoder('weights', weights.StreamSpec, weights.encode, weights.decode)
}


def _paper() -> ModelCoder:
  from rotbits_jax import paper

  return ModelCoder(
    'paper',
    paper.STREAMS,
    paper.Options,
    paper.refuse,
    paper.encode,
    paper.decode,
    paper.dtypes,
  )
