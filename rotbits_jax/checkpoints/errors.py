"""The error for a checkpoint that cannot be read or written."""


class CheckpointError(ValueError):
  """A file, config or tensor of a checkpoint is missing, damaged or unsupported."""
