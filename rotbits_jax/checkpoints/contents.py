"""The content of a checkpoint in memory."""

from typing import NamedTuple

from rotbits_jax import models

CONFIG = 'config.json'

ADAPTER_CONFIG = 'adapter_config.json'
"""The name of the config of an adapter in PEFT's layout."""


class Checkpoint(NamedTuple):
  """A model and the other files of its checkpoint directory.

  Attributes:
    model: the parameters and their config.
    files: bytes of the sidecar files (configs, tokenizer) beside the weights, by name.
    stem: file name, without suffix, that SliceGPT gave to the weights and the slicing
      JSON; None if the model is dense.
  """

  model: models.Model
  files: dict[str, bytes]
  stem: str | None

  def __repr__(self) -> str:
    """Returns one line: a notebook would print the bytes of every file."""
    return f'Checkpoint({self.model!r}, files={sorted(self.files)}, stem={self.stem!r})'
