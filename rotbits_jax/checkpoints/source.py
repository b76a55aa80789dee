"""Sources of records."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from rotbits_jax import models
from rotbits_jax.checkpoints import tensor_files


class FileSource(Protocol):
  """Something that is encoded, a record at a time."""

  config: models.ModelConfig | None
  records: tuple[str, ...]
  files: Mapping[str, bytes]
  left_out: tuple[str, ...]
  stem: str | None
  weights: tuple[tensor_files.WeightsFile, ...]

  def specs(self, record: str) -> models.Params: ...

  def read(self, record: str) -> models.Params: ...

  def gaps(self, file: tensor_files.WeightsFile) -> Iterator[memoryview]: ...

  def fingerprint(self) -> str | None: ...
