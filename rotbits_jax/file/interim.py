"""Interim: sources of the present code as the coming protocol has them."""

from rotbits_jax import models
from rotbits_jax import structured


class ModelSource:
  weights = ()

  def __init__(self, source, files, stem):
    self._source = source
    self.files = dict(getattr(source, 'files', {}) if files is None else files)
    self.stem = getattr(source, 'stem', None) if stem is None else stem
    self.left_out = getattr(source, 'left_out', ())
    self.config = source.config
    self.stored_as = getattr(source, 'stored_as', None)
    self.buffers = dict(source.buffers)
    names = [models.names.layer(i) for i in range(self.config.num_layers)]
    names += list(source.specs(None))
    self.records = (*names, *(['buffers'] if self.buffers else []))

  def specs(self, record):
    if not isinstance(record, str):
      return self._source.specs(record)
    if record == 'buffers':
      return {'buffers': self.buffers}
    index = models.names.layer_index(record)
    if index is None:
      return {record: self._source.specs(None)[record]}
    return {record: self._source.specs(index)}

  def read(self, record):
    if record == 'buffers':
      return {'buffers': self.buffers}
    index = models.names.layer_index(record)
    if index is None:
      return {record: self._source.outer()[record]}
    return {record: self._source.layer(index)}

  def gaps(self, file):
    yield from ()

  def fingerprint(self):
    if isinstance(self._source, models.Model):
      return None
    return self._source.fingerprint()


class TensorSource:
  config = stem = None

  def __init__(self, source, files):
    self._source = source
    self.files = dict(source.files if files is None else files)
    self.left_out, self.reason = source.left_out, source.reason
    self.weights = source.weights
    self._groups = source.groups()
    self.records = tuple(self._groups)

  def specs(self, record):
    return structured.unflatten(
      {name: self._source.specs[name] for name in self._groups[record]}
    )

  def read(self, record):
    return structured.unflatten(
      {name: self._source.read(name) for name in self._groups[record]}
    )

  def gaps(self, file):
    return self._source.rest(file)

  def fingerprint(self):
    return self._source.fingerprint()
