"""Parts of other packages: a leaf, a coder and a preset that this package lacks."""

import dataclasses
from typing import Annotated, Any, ClassVar, NamedTuple
import zlib

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import coders
from rotbits_jax.system import checksums
from rotbits_jax.system import schema

TREE = {'a': {'x': np.arange(24, dtype=np.float16).reshape(4, 6)}}


@dataclasses.dataclass(frozen=True)
class Doubled(structured.Structured):
  """An array that is stored as its half."""

  type_name: ClassVar[str] = 'acme.doubled'

  half: Annotated[Any, structured.Array('rc')]

  shape = property(lambda self: self.half.shape)
  dtype = property(lambda self: np.dtype(self.half.dtype))

  def materialize(self, *needed):
    return self.half * 2


class Array(schema.Object):
  shape: tuple[schema.Size, ...]
  dtype: str
  crc32: schema.Crc32

  @property
  def nbytes(self):
    return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Spec(schema.Object):
  nbytes: schema.Size
  arrays: tuple[Array, ...]


class Encoded(NamedTuple):
  spec: Spec
  pieces: list[np.ndarray]


def encode(arrays, known):
  del known  # this coder takes no advantage of it
  data = zlib.compress(b''.join(x.tobytes() for x in arrays))
  entries = tuple(
    Array(shape=x.shape, dtype=x.dtype.name, crc32=checksums.of_array(x))
    for x in arrays
  )
  pieces = [np.frombuffer(data, np.uint8)]
  return Encoded(Spec(nbytes=len(data), arrays=entries), pieces)


def decode(spec, data, *, out, known, uses):
  del known, uses  # nor of these
  size = sum(array.nbytes for array in out)
  data.read(0, packed := np.empty(spec.nbytes, np.uint8))
  left = zlib.decompressobj().decompress(packed, size)
  for array, entry in zip(out, spec.arrays, strict=True):
    part, left = left[: array.nbytes], left[array.nbytes :]
    array[...] = np.frombuffer(part, array.dtype).reshape(array.shape)
    if checksums.of_array(array) != entry.crc32:
      raise ValueError('an array is damaged')


@pytest.fixture(autouse=True)
def fixture_registries(monkeypatch):
  monkeypatch.setattr(coders, 'CODERS', dict(coders.CODERS))
  for name in [x for x in structured.TYPES if x.startswith('acme.')]:
    monkeypatch.delitem(structured.TYPES, name)


def test_a_leaf_of_another_package():
  structured.register(Doubled)
  data = rotbits_jax.encode({'a': {'x': Doubled(TREE['a']['x'])}})
  assert isinstance(rotbits_jax.decode(data)['a']['x'], Doubled)
  del structured.TYPES['acme.doubled']
  rotbits_jax.inspect(data)
  with pytest.raises(rotbits_jax.ContainerError, match=r'acme\.doubled'):
    rotbits_jax.decode(data)


def test_a_coder_of_another_package():
  coders.CODERS['acme.zlib'] = coders.RecordCoder(Spec, encode, decode)
  data = rotbits_jax.encode(TREE, preset=presets.exact()._replace(coder='acme.zlib'))
  np.testing.assert_array_equal(rotbits_jax.decode(data)['a']['x'], TREE['a']['x'])
  del coders.CODERS['acme.zlib']
  rotbits_jax.inspect(data)
  with pytest.raises(rotbits_jax.ContainerError, match=r'acme\.zlib'):
    rotbits_jax.decode(data)


def test_a_preset_of_another_package():
  preset = presets.free(tolerance=0.25)._replace(name='acme.tidy')
  data = rotbits_jax.encode(TREE, preset=preset._replace(keeps='bits', rounding=None))
  assert rotbits_jax.inspect(data).preset == 'acme.tidy'
