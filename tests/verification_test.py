"""`verify` names damaged tensors and other models, and accepts an undamaged file."""

import functools
import json
import pathlib
import struct

import jax
import ml_dtypes
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import encode
from rotbits_jax.file import verification
from tests import random_models
from tests import weights_files

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
NAME = 'llama-tiny-sliced-head-0.25'
BUFFER = 'model.layers.0.self_attn.rotary_emb.inv_freq'


@functools.cache
def encoded(preset):
  return rotbits_jax.encode(checkpoints.open_checkpoint(TESTDATA / NAME), preset=preset)


def flipped(data, stream):
  """Returns the file with one bit in the middle of a stream flipped."""
  (length,) = struct.unpack('<Q', data[:8])
  begin, end = json.loads(data[8 : 8 + length])[stream]['data_offsets']
  damaged = bytearray(data)
  damaged[8 + length + (begin + end) // 2] ^= 1
  return bytes(damaged)


def changed(folder, change):
  """Saves the checkpoint with another kernel in its second layer."""
  checkpoint = checkpoints.load_checkpoint(TESTDATA / NAME)
  layers = list(checkpoint.model.layers())
  layers[1]['mlp']['up']['kernel'] = change(np.array(layers[1]['mlp']['up']['kernel']))
  model = rotbits_jax.models.from_layers(
    checkpoint.model.config, checkpoint.model.outer(), layers, {}
  )
  checkpoints.save_checkpoint(checkpoint._replace(model=model), folder)
  return folder


def with_another_bit(kernel):
  kernel.view(np.uint16)[3, 5] ^= 1
  return kernel


def test_a_file_is_compared_with_its_checkpoint():
  exact, free = (
    rotbits_jax.verify(encoded(preset), against=TESTDATA / NAME)
    for preset in ('exact', 'free')
  )
  assert exact.same_bits
  assert not free.same_bits
  assert free.kl < 10 * free.kl_rerounded
  reference = checkpoints.load_checkpoint(TESTDATA / NAME).model
  floor_of = lambda draw: verification.divergences(reference, reference, [draw])[1]
  floors = [*map(floor_of, verification.rotated(reference))]
  assert free.kl_rerounded == max(floors) > min(floors)


@pytest.mark.parametrize(
  ('preset', 'change', 'words'),
  [
    ('exact', with_another_bit, 'layers.1/mlp/up/kernel: differs'),
    ('free', np.negative, 'computes a different function'),
  ],
)
def test_another_model_is_named(tmp_path, preset, change, words):
  with pytest.raises(rotbits_jax.ContainerError, match=words):
    rotbits_jax.verify(encoded(preset), against=changed(tmp_path / 'x', change))


def negated_rows(checkpoint):
  """Negates the embeddings of tokens that the 256 random ones are not."""
  tokens = np.random.default_rng(0).choice(np.arange(2000), 256)
  rows = np.setdiff1d(np.arange(2000), tokens)[:9]
  table = np.array(checkpoint.model.params['embed']['tokens'])
  table[rows] = -table[rows]
  checkpoint.model.params['embed']['tokens'] = table


def another_buffer(checkpoint):
  checkpoint.model.buffers[BUFFER] = np.ones(6, np.float32)


@pytest.mark.parametrize(
  ('change', 'words'),
  [(negated_rows, 'embed/tokens: its'), (another_buffer, 'buffers: differ')],
)
def test_what_random_tokens_do_not_show_is_compared(tmp_path, change, words):
  config = random_models.BASE | {'num_hidden_layers': 1, 'vocab_size': 2000}
  model = random_models.random_model(config, np.float16)
  files = {'config.json': json.dumps(config).encode()}
  buffers = {BUFFER: np.zeros(6, np.float32)}
  checkpoint = checkpoints.Checkpoint(model.replace(buffers=buffers), files, None)
  checkpoints.save_checkpoint(checkpoint, tmp_path / 'x')
  data = rotbits_jax.encode(checkpoint, preset='free')
  verified = rotbits_jax.verify(data, against=tmp_path / 'x')
  assert verified.compared == verified.tensors == len(dict(model.leaves())) + 1
  change(checkpoint)
  checkpoints.save_checkpoint(checkpoint, tmp_path / 'y')
  with pytest.raises(rotbits_jax.ContainerError, match=words):
    rotbits_jax.verify(data, against=tmp_path / 'y')


@pytest.mark.parametrize('stream', ['layers.2', 'embed', 'files/config.json'])
def test_damage_that_the_header_does_not_show(stream):
  data = flipped(encoded('free'), stream)
  rotbits_jax.inspect(data)
  with pytest.raises(rotbits_jax.ContainerError, match=stream):
    rotbits_jax.verify(data)


def test_a_file_that_decodes_to_something_else_never_appears(tmp_path, monkeypatch):
  output, real = tmp_path / 'model.rotbits', encode.Encoder.encode_record

  def encode_record(self, record, resolve, **options):
    flat = structured.flatten(record.params)
    if record.name == 'layers.1':
      flat['layers.1/mlp/up/kernel'] = -flat['layers.1/mlp/up/kernel']
    changed = record._replace(params=structured.unflatten(flat))
    return real(self, changed, resolve, **options)

  monkeypatch.setattr(encode.Encoder, 'encode_record', encode_record)
  output.write_text('the old file')
  with pytest.raises(rotbits_jax.ContainerError, match='mlp/up/kernel: differs'):
    rotbits_jax.encode_to_file(
      TESTDATA / NAME, output, preset='exact', check=True, overwrite=True
    )
  assert [path.name for path in tmp_path.iterdir()] == ['model.rotbits']
  assert output.read_text() == 'the old file'


# ---- tensors of no known family, rounded to steps


def tensors(seed=0):
  rng = np.random.default_rng(seed)
  outlier = rng.normal(size=(64, 96)).astype(np.float32)
  outlier[3, 5] = 3000  # its integer takes more than 16 bits
  return {
    'half': rng.normal(size=(64, 96)).astype(np.float16),
    'brain': rng.normal(size=(64, 96)).astype(ml_dtypes.bfloat16),
    'outlier': outlier,
    'norm': np.ones(96, np.float32),
    'steps': np.arange(6).reshape(2, 3),
  }


def written(folder, arrays, **files):
  folder.mkdir()
  weights_files.write_safetensors(folder / 'model.safetensors', arrays)
  for name, content in files.items():
    (folder / name.replace('_', '.')).write_text(content)
  return folder


@functools.cache
def near_tree(step=-5.0):
  return rotbits_jax.encode(tensors(), preset='near', step=step)


@pytest.mark.parametrize('step', [-6.5, -5.0, 1.0])
def test_rounded_arrays_are_within_their_steps(step):
  verified = rotbits_jax.verify(near_tree(step), against=tensors())
  assert verified.ways['step'] == verification.Count(tensors=3, elements=3 * 64 * 96)
  assert verified.ways['bits'] == verification.Count(tensors=2, elements=96 + 6)
  assert verified.same_bits is None
  assert 0 < verified.worst.error <= verified.worst.bound


@pytest.mark.parametrize('step', [-6.5, -5.0, 1.0])
def test_rounded_arrays_of_another_model_are_refused(step):
  with pytest.raises(rotbits_jax.ContainerError, match='more than its step allows'):
    rotbits_jax.verify(near_tree(step), against=tensors(seed=1))


@pytest.mark.parametrize('name', ['half', 'brain', 'outlier'])
def test_one_element_beyond_its_step_is_named(name):
  other = tensors()
  other[name][7, 9] += 0.2
  words = rf'{name}: differs .* step allows: .* at \[7, 9\]: .* in the file, .* in the'
  with pytest.raises(rotbits_jax.ContainerError, match=words):
    rotbits_jax.verify(near_tree(), against=other)


def test_an_array_without_a_step_must_have_its_bits():
  other = tensors()
  other['norm'][5] = 2
  words = r'norm: differs .* 1 of 96 elements, the first at \[5\]: 1.0 in the file, 2.0'
  with pytest.raises(rotbits_jax.ContainerError, match=words):
    rotbits_jax.verify(near_tree(), against=other)


def test_a_step_larger_than_the_elements_compares_nothing():
  tree = {'w': tensors()['half']}
  data = rotbits_jax.encode(tree, preset='near', offsets={'w': 10.0})
  verified = rotbits_jax.verify(data, against=tree)
  assert verified.ways['none'].tensors == 1
  assert verified.compared == 0


def test_a_checkpoint_of_no_family_that_near_rounded(tmp_path):
  source = written(tmp_path / 'a', tensors())
  other = written(tmp_path / 'b', tensors(seed=1))
  rotbits_jax.encode_to_file(source, tmp_path / 'x', preset='near')
  assert rotbits_jax.verify(tmp_path / 'x', against=source).ways['step'].tensors == 3
  with pytest.raises(rotbits_jax.ContainerError, match='more than its step allows'):
    rotbits_jax.verify(tmp_path / 'x', against=other)


@functools.cache
def two_models():
  """Makes a model, and another one of the same config with independent weights."""
  config = random_models.BASE | {'num_hidden_layers': 1, 'vocab_size': 200}
  model = random_models.random_model(config, np.float16)
  rng = np.random.default_rng(5)
  drawn = lambda x: (np.std(x) * rng.normal(size=x.shape)).astype(x.dtype)
  params = jax.tree.map(lambda x: drawn(x) if np.std(x) else x, model.params)
  return model, model.replace(params=params)


@pytest.mark.parametrize('step', [-5.0, -1.0])
def test_a_model_that_near_rounded_is_no_other_one(step):
  model, other = two_models()
  data = rotbits_jax.encode(model, preset='near', step=step)
  assert rotbits_jax.verify(data, against=model).kl > 0
  with pytest.raises(rotbits_jax.ContainerError, match='the decoded model'):
    rotbits_jax.verify(data, against=other)


def test_an_approximation_of_another_preset_is_no_other_model():
  model, other = two_models()
  preset = presets.near(step=-5.0)._replace(name='mine')
  data = rotbits_jax.encode(model, preset=preset)
  assert rotbits_jax.verify(data, against=model).compared == 0
  with pytest.raises(rotbits_jax.ContainerError, match='the decoded model may be any'):
    rotbits_jax.verify(data, against=other)


# ---- what a file is compared with


def test_the_other_side_may_be_a_file_or_a_model(tmp_path):
  data = encoded('exact')
  checkpoint = checkpoints.load_checkpoint(TESTDATA / NAME)
  (tmp_path / 'x.rotbits').write_bytes(data)
  for other in (
    data,
    tmp_path / 'x.rotbits',
    rotbits_jax.file.Reader(data),
    checkpoint,
    checkpoint.model,
    checkpoints.open_checkpoint(TESTDATA / NAME),
  ):
    assert rotbits_jax.verify(data, against=other).same_bits, type(other)


def test_a_reader_brings_its_base():
  tree = tensors()
  tuned = tree | {'norm': np.zeros(96, np.float32)}
  alone = rotbits_jax.encode(tuned)
  data = rotbits_jax.encode(tuned, base=tree)
  other = rotbits_jax.file.Reader(data, base=tree)
  assert rotbits_jax.verify(alone, against=other).same_bits


def test_plain_tensors_have_names(tmp_path):
  source = written(tmp_path / 'a', tensors())
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  assert rotbits_jax.verify(tmp_path / 'x', against=tensors()).same_bits
  for name in ('lost', 'more'):
    one_side = tensors() | {'more': np.zeros(3)} if name == 'more' else tensors()
    words = 'more: only the given PyTree has it'
    if name == 'lost':
      del one_side['half']
      words = 'half: only the file has it'
    with pytest.raises(rotbits_jax.ContainerError, match=words):
      rotbits_jax.verify(tmp_path / 'x', against=one_side)


def test_a_model_is_not_compared_with_a_tree(tmp_path):
  source = written(tmp_path / 'a', tensors())
  tree = rotbits_jax.encode(tensors())
  for data, other, words in (
    (
      encoded('exact'),
      tensors(),
      'holds a model, and cannot be compared with a PyTree',
    ),
    (tree, encoded('exact'), 'holds a PyTree, and cannot be compared with a model'),
    (tree, source, 'holds a PyTree, and cannot be compared with a checkpoint'),
  ):
    with pytest.raises(ValueError, match=words):
      rotbits_jax.verify(data, against=other)


def test_both_sides_of_a_difference_are_named():
  tree = {'w': np.zeros((3, 4), np.float16)}
  data = rotbits_jax.encode(tree)
  changed_tree = {'w': tree['w'].copy()}
  changed_tree['w'][1, 2] = 0.5
  for other, words in (
    (
      changed_tree,
      r'w: differs from the given PyTree: 1 of 12 elements, the first at ',
    ),
    (changed_tree, r'\[1, 2\]: 0.0 in the file, 0.5 in the given PyTree'),
    ({'w': tree['w'][:2]}, r'w: float16 \[3, 4\] in the file, float16 \[2, 4\] in the'),
  ):
    with pytest.raises(rotbits_jax.ContainerError, match=words):
      rotbits_jax.verify(data, against=other)


def test_the_config_field_that_differs_is_named():
  words = (
    r'is not that of the given model: \w+ is .* in the file, .* in the given model'
  )
  config = random_models.BASE | {'num_hidden_layers': 1}
  with pytest.raises(rotbits_jax.ContainerError, match=words):
    rotbits_jax.verify(
      encoded('exact'), against=random_models.random_model(config, np.float16)
    )


def test_weights_that_a_file_does_not_store_are_missed(tmp_path):
  source = written(tmp_path / 'a', tensors(), weights_pth='x', config_json='{}')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  assert rotbits_jax.verify(tmp_path / 'x', against=source).missed == ('weights.pth',)
  file = source / 'model.safetensors'
  assert rotbits_jax.verify(tmp_path / 'x', against=file).missed == ()


def test_arrays_of_jax_may_be_rounded_too():
  tree = {'w': jax.numpy.asarray(tensors()['half'])}
  data = rotbits_jax.encode(tree, preset='near')
  assert rotbits_jax.verify(data, against=tree).ways['step'].tensors == 1


def test_without_another_side_nothing_is_compared():
  verified = rotbits_jax.verify(rotbits_jax.encode(tensors()))
  assert verified.ways['none'].tensors == verified.tensors == 5
  assert (verified.compared, verified.same_bits) == (0, None)
