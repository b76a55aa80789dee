"""Parts of other packages: a distribution that is only a folder on the path."""

import pathlib
import sys

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import cli
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.cli import encode
from rotbits_jax.file import coders

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
SLICED = TESTDATA / 'llama-tiny-sliced-head-0.25'

LEAF = '''
from typing import Annotated, Any, ClassVar

from flax import struct
import numpy as np

from rotbits_jax import structured


@structured.register
@struct.dataclass
class Doubled(structured.Structured):
  """An array that is stored as its half."""

  type_name: ClassVar[str] = 'acme.doubled'

  half: Annotated[Any, structured.Array(2)]

  shape = property(lambda self: self.half.shape)
  dtype = property(lambda self: np.dtype(self.half.dtype))

  def materialize(self, *needed):
    return self.half * 2
'''

CODER = """
import dataclasses
import zlib
from typing import NamedTuple

import numpy as np

from rotbits_jax.file import coders
from rotbits_jax.system import checksums
from rotbits_jax.system import schema


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
  shape: tuple[schema.Size, ...]
  dtype: str
  crc32: schema.Crc32

  @property
  def nbytes(self):
    return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  nbytes: schema.Size
  arrays: tuple[Array, ...]

  def grid(self, array):
    return None


class Encoded(NamedTuple):
  spec: Spec
  data: np.ndarray


def encode(arrays):
  data = zlib.compress(b''.join(x.tobytes() for x in arrays))
  entries = tuple(
    Array(shape=x.shape, dtype=x.dtype.name, crc32=checksums.of_array(x))
    for x in arrays
  )
  return Encoded(Spec(nbytes=len(data), arrays=entries), np.frombuffer(data, np.uint8))


def decode(spec, data, *, out):
  size = sum(array.nbytes for array in out)
  found = zlib.decompressobj().decompress(data.tobytes(), size)
  for array, entry in zip(out, spec.arrays, strict=True):
    part, found = found[: array.nbytes], found[array.nbytes :]
    array[...] = np.frombuffer(part, array.dtype).reshape(array.shape)
    if checksums.of_array(array) != entry.crc32:
      raise ValueError('an array is damaged')


CODER = coders.RecordCoder('acme.zlib', Spec, encode, decode)
"""

PRESET = """
from rotbits_jax import presets


def tidy(*, tolerance: float = 0.5, floor: str = 'x', bits: int = 3, folds: int = 1):
  return presets.free(tolerance=tolerance)._replace(name='acme.tidy')
"""

POINTS = """
[rotbits_jax.leaves]
acme.doubled = acme_parts.leaf:Doubled
[rotbits_jax.coders]
acme.zlib = acme_parts.coder:CODER
[rotbits_jax.presets]
acme.tidy = acme_parts.preset:tidy
"""

TREE = {'a': {'x': np.arange(24, dtype=np.float16).reshape(4, 6)}}


@pytest.fixture
def distribution(tmp_path, monkeypatch):
  """Puts a distribution of the name acme-parts on the path, and returns its folder."""
  package = tmp_path / 'acme_parts'
  package.mkdir()
  for name, text in {'leaf': LEAF, 'coder': CODER, 'preset': PRESET}.items():
    (package / f'{name}.py').write_text(text)
  (package / '__init__.py').write_text('')
  info = tmp_path / 'acme_parts-1.0.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: acme-parts\nVersion: 1')
  (info / 'entry_points.txt').write_text(POINTS)
  (info / 'top_level.txt').write_text('acme_parts\n')
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  for name in [x for x in sys.modules if x.startswith('acme_parts')]:
    del sys.modules[name]
  structured.TYPES.pop('acme.doubled', None)


def encoded_leaf():
  import acme_parts.leaf

  return rotbits_jax.encode({'a': {'x': acme_parts.leaf.Doubled(TREE['a']['x'])}})


def forget():
  """Makes the process one that has not imported the distribution."""
  for name in [x for x in sys.modules if x.startswith('acme_parts')]:
    del sys.modules[name]
  structured.TYPES.pop('acme.doubled', None)


def plugins_of(data):
  (manifest,) = rotbits_jax.file.Reader(data).manifests
  return [(x.group, x.name, x.package) for x in manifest.plugins]


@pytest.mark.usefixtures('distribution')
def test_a_leaf_is_found_by_its_name():
  data = encoded_leaf()
  assert plugins_of(data) == [('leaves', 'acme.doubled', 'acme-parts')]
  forget()
  leaf = rotbits_jax.decode(data)['a']['x']
  np.testing.assert_array_equal(leaf.materialize(), TREE['a']['x'] * 2)


@pytest.mark.usefixtures('distribution')
def test_a_coder_is_found_by_its_name():
  preset = presets.exact()._replace(coder='acme.zlib')
  data = rotbits_jax.encode(TREE, preset=preset)
  assert plugins_of(data) == [('coders', 'acme.zlib', 'acme-parts')]
  np.testing.assert_array_equal(rotbits_jax.decode(data)['a']['x'], TREE['a']['x'])
  assert rotbits_jax.verify(data).records == 1


@pytest.mark.usefixtures('distribution')
def test_a_coder_may_be_registered(monkeypatch):
  import acme_parts.coder

  monkeypatch.setattr(coders, '_KNOWN', dict(coders._KNOWN))
  coder = coders.register(acme_parts.coder.CODER._replace(name='mine'))
  with pytest.raises(ValueError, match='exists already'):
    coders.register(coder)
  data = rotbits_jax.encode(TREE, preset=presets.exact()._replace(coder='mine'))
  assert plugins_of(data) == [('coders', 'mine', 'acme-parts')]
  np.testing.assert_array_equal(rotbits_jax.decode(data)['a']['x'], TREE['a']['x'])


@pytest.mark.usefixtures('distribution')
def test_a_preset_is_found_by_its_name():
  made = presets.make('acme.tidy', tolerance=0.25)
  assert made.options['tolerance'] == 0.25
  with pytest.raises(ValueError, match=r'acme\.tidy'):
    presets.make('unknown')


@pytest.mark.usefixtures('distribution')
def test_options_that_cannot_be_flags(rotbits, monkeypatch, tmp_path):
  monkeypatch.setattr(cli, 'encode', encode)  # as it was before the test
  monkeypatch.delitem(sys.modules, encode.__name__)
  code, out, err = rotbits('completion', '--shell=bash')
  assert (code, err) == (0, '')
  assert '--folds=' in out
  args = ['encode', f'--checkpoint={SLICED}', f'--output={tmp_path / "x"}']
  for flag in ('--bits=4', '--floor=1'):
    code, _, err = rotbits(*args, '--preset=acme.tidy', flag)
    name = flag.partition('=')[0]
    assert (code, err) == (
      2,
      f'rotbits encode: {name} is not for --preset=acme.tidy\n',
    )
  code, _, err = rotbits(*args, '--preset=exact')
  assert (code, err) == (0, '')


@pytest.mark.filterwarnings('ignore:rotbits_jax.presets')
def test_a_part_that_cannot_be_imported_is_named_with_its_package(
  distribution, rotbits, monkeypatch, tmp_path
):
  leaf = encoded_leaf()
  forget()
  for name in ('leaf', 'preset'):
    (distribution / 'acme_parts' / f'{name}.py').write_text('import missing_module\n')
  cause = "of the package 'acme-parts' cannot be imported: ModuleNotFoundError: No"
  with pytest.raises(ValueError, match=f"leaves 'acme.doubled' {cause}"):
    rotbits_jax.decode(leaf)
  with pytest.warns(UserWarning, match=f"presets 'acme.tidy' {cause}"):
    assert 'acme.tidy' not in presets.known()
  # Other presets are not touched by it.
  monkeypatch.setattr(cli, 'encode', encode)
  monkeypatch.delitem(sys.modules, encode.__name__)
  args = f'--checkpoint={SLICED}', f'--output={tmp_path / "x"}', '--preset=exact'
  assert rotbits('encode', *args)[0] == 0


def test_what_is_not_installed_is_named_with_its_package(distribution, monkeypatch):
  leaf = encoded_leaf()
  preset = presets.exact()._replace(coder='acme.zlib')
  coder = rotbits_jax.encode(TREE, preset=preset)
  forget()
  monkeypatch.setattr(sys, 'path', [x for x in sys.path if x != str(distribution)])
  for data, part in ((leaf, "leaf type 'acme.doubled'"), (coder, "coder 'acme.zlib'")):
    rotbits_jax.inspect(data)
    with pytest.raises(rotbits_jax.ContainerError) as caught:
      rotbits_jax.decode(data)
    assert f"the {part} is not known: install 'acme-parts'" in str(caught.value)
  with pytest.raises(ValueError, match='no coder of the name'):
    rotbits_jax.encode(TREE, preset=preset)
