"""The errors for checkpoints that cannot be read or written."""


class CheckpointError(ValueError):
  """A file, config or tensor of a checkpoint is missing, damaged or unsupported."""


class UnsupportedError(CheckpointError):
  """A checkpoint is not of a known family, or has a setting or tensor of its own.

  The files need not be damaged. `open_tensors` opens such a checkpoint.
  """
