"""The error of a checkpoint that cannot be read or written."""


class CheckpointError(ValueError):
  """A checkpoint's file, config or tensor is not what it must be."""
