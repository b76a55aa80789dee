"""What a checkpoint is, once it is read."""

from typing import NamedTuple

from rotbits_jax import models

CONFIG = 'config.json'


class Checkpoint(NamedTuple):
  """What a checkpoint's directory holds.

  Attributes:
    model: the parameters and their config.
    files: the files beside the weights (configs, tokenizer), byte for byte.
    stem: what SliceGPT named the weights and the slicing JSON; None if dense.
  """

  model: models.Model
  files: dict[str, bytes]
  stem: str | None
