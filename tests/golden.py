"""Golden files: files of every preset, and the digests of the tensors in them.

  python -m tests.golden write    # writes the files of `cases`
  python -m tests.golden check    # decodes them all; exit code 1 if a digest differs

The files are those of this version of the format. Once it is released, a change that
decodes them to other bits is a new version. `digests.json` has the digests of each.

The test of golden files checks them under other settings of JAX, which must not change
what is decoded.
"""

import hashlib
import json
import pathlib
import sys

import jax
import ml_dtypes
import msgspec
import numpy as np

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import container
from rotbits_jax.presets import steps
from tests import random_models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FOLDER = TESTDATA / 'golden' / f'v{container.VERSION}'
DIGESTS = FOLDER / 'digests.json'
WIDTHS = (20, 24, 20, 16, 20)


def tree():
  """Arrays of every dtype, with special numbers among them."""
  rng = np.random.default_rng(0)
  floats = {}
  for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
    normal = rng.normal(size=(40, 30)).astype(dtype)
    normal[3, 4], normal[5], normal[6], normal[7] = np.nan, np.inf, 0, -normal[6]
    floats[np.dtype(dtype).name] = normal
  integers = {
    name: np.asarray(rng.normal(size=(30, 20)) * 50, name)
    for name in ('bool', 'int8', 'int16', 'int32', 'int64')
  }
  unsigned = {
    name: rng.integers(0, 200, (30, 20)).astype(name)
    for name in ('uint8', 'uint16', 'uint32', 'uint64')
  }
  shapes = {'scalar': np.asarray(3, np.float32), 'none': np.zeros((3, 0), np.float16)}
  return {'floats': floats, 'integers': integers | unsigned, 'shapes': shapes}


def few_values():
  """Arrays with many zeros or few distinct numbers."""
  rng = np.random.default_rng(1)
  normal = rng.normal(size=(64, 128)).astype(np.float16)
  steps = rng.uniform(0.01, 0.02, (64, 4, 1)).astype(np.float16)
  levels = np.float32(steps) * rng.integers(0, 16, (64, 4, 32)) - np.float32(0.1)
  few = rng.normal(size=6).astype(np.float16)
  return {
    'sparse': np.where(rng.random(normal.shape) < 0.9, 0, normal).astype(np.float16),
    'levels': levels.reshape(64, 128).astype(np.float16),
    'table': few[rng.integers(0, 6, normal.shape)],
  }


def dense():
  """The base of files: the first layer and tokens of a checkpoint of the tests."""
  model = rotbits_jax.load_checkpoint(TESTDATA / 'phi2-tiny-dense').model
  outer, tokens = model.outer(), 64
  outer['embed'] = {'tokens': outer['embed']['tokens'][:tokens]}
  outer['head'] = {key: x[..., :tokens] for key, x in outer['head'].items()}
  config = msgspec.structs.replace(
    model.config,
    num_layers=1,
    vocab_size=tokens,
    segment_widths=model.config.segment_widths[:2],
  )
  return models.from_layers(config, outer, [model.layer(0)])


def base_of(name):
  """The base that a golden file needs; None for none."""
  if name == 'beside-base':
    return dense().layer(0)
  return dense() if name.startswith('recipe') else None


def beside_base():
  """Arrays that differ little from those of a base."""
  found, rng = dense().layer(0), np.random.default_rng(2)
  up = np.float32(found['mlp']['up']['kernel'])
  up += 0.01 * up.std() * rng.normal(size=up.shape)
  found['mlp']['up']['kernel'] = up.astype(np.float16)
  few = found['mlp']['down']['kernel'].copy()
  few[3, :9] += np.float16(1)
  found['mlp']['down']['kernel'] = few
  out = np.float32(found['attention']['out']['kernel'])
  found['attention']['out']['kernel'] = (0.98 * out).astype(np.float16)
  return found


def cases():
  """What is encoded, and how, by the name of the file."""
  sliced = random_models.sliced_llama(WIDTHS, np.float16)
  wide = random_models.sliced_llama(WIDTHS, np.float32, seed=1)
  bfloat16 = random_models.random_model(
    random_models.BASE | {'num_hidden_layers': 2}, ml_dtypes.bfloat16
  )
  calibration = steps.calibrate(sliced, np.arange(40))
  lines = presets.near(offsets=calibration.offsets, inputs=calibration.inputs)
  recipe = random_models.sliced_from(dense(), (96, 112))
  return {
    'tree': (tree(), {'preset': 'exact'}),
    'beside-base': (beside_base(), {'base': base_of('beside-base')}),
    'recipe': (recipe, {'base': dense(), 'preset': 'free'}),
    'recipe-exact': (recipe, {'base': dense(), 'preset': 'exact'}),
    'exact': (sliced, {'preset': 'exact'}),
    'free': (sliced, {'preset': 'free'}),
    'free-float32': (wide, {'preset': 'free'}),
    'free-dense-bfloat16': (bfloat16, {'preset': 'free'}),
    'near': (sliced, {'preset': 'near', 'step': -4.75}),
    'near-dense-bfloat16': (bfloat16, {'preset': 'near'}),
    'near-lines': (sliced, {'preset': lines}),
    'few-values': (few_values(), {'preset': 'exact'}),
    'paper': (sliced, {'preset': 'paper'}),
    'paper-entropy': (sliced, {'preset': 'paper', 'entropy': True}),
    'paper-qr': (sliced, {'preset': 'paper', 'canonicalizer': 'qr'}),
    'paper-published': (
      sliced,
      {
        'preset': 'paper',
        'canonicalizer': 'svd',
        'rotation_codec': 'symmetric_eig',
        'correction': 'exact',
      },
    ),
  }


def digests(path, base=None):
  """Dtype, shape and SHA-256 of every array in a file, by its path."""
  decoded = rotbits_jax.decode(path, base=base)
  trees = {'': decoded}
  if isinstance(decoded, rotbits_jax.Model):
    trees = {f'layers.{i}/': layer for i, layer in enumerate(decoded.layers())}
    trees[''] = decoded.outer()
  found = {}
  for prefix, tree in trees.items():
    for name, leaf in structured.flatten(tree).items():
      # The stored form of a structured leaf does not depend on its form in memory.
      is_leaf = structured.is_structured(leaf)
      arrays = leaf.stored()[1] if is_leaf else {'': np.asarray(leaf)}
      for key, array in arrays.items():
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        found[f'{prefix}{name}:{key}'] = [array.dtype.name, list(array.shape), digest]
  return found


def names():
  """The names of all golden files; each may lack its digests."""
  return sorted(path.stem for path in FOLDER.glob('*.rotbits'))


def file_of(name):
  return FOLDER / f'{name}.rotbits'


def recorded():
  """The digests of each golden file."""
  return json.loads(DIGESTS.read_text())


def write():
  """Writes the golden files and their digests."""
  files = {name: rotbits_jax.encode(x, **y) for name, (x, y) in cases().items()}
  FOLDER.mkdir(parents=True, exist_ok=True)
  for name in names():
    file_of(name).unlink()
  for name, data in files.items():
    file_of(name).write_bytes(data)
  entries = {name: digests(file_of(name), base_of(name)) for name in files}
  DIGESTS.write_text(json.dumps(entries, indent=0) + '\n')


def check():
  """Returns the arrays whose digests differ, and counts all."""
  wrong, count, entries = [], 0, recorded()
  for name in sorted({*entries, *names()}):
    if name not in entries or not file_of(name).exists():
      wrong.append(name)
      continue
    expected, found = entries[name], digests(file_of(name), base_of(name))
    count += len(expected)
    wrong += [
      f'{name}/{path}'
      for path in expected.keys() | found.keys()
      if expected.get(path) != found.get(path)
    ]
  return wrong, count


def main():
  if sys.argv[1:] == ['write']:
    write()
    return 0
  wrong, count = check()
  devices = len(jax.devices())
  print(f'{count} arrays, {len(wrong)} differ, jax {jax.__version__}, {devices=}')
  return bool(wrong)


if __name__ == '__main__':
  sys.exit(main())
