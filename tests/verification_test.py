"""`verify` names damaged tensors and other models, and accepts an undamaged file."""

import functools
import json
import pathlib
import struct

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.file import encode
from rotbits_jax.file import verification
from tests import random_models

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
  assert verified.compared == len(dict(model.leaves()))
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

  def encode_record(self, record, resolve):
    flat = structured.flatten(record.params)
    if record.name == 'layers.1':
      flat['layers.1/mlp/up/kernel'] = -flat['layers.1/mlp/up/kernel']
    return real(self, record._replace(params=structured.unflatten(flat)), resolve)

  monkeypatch.setattr(encode.Encoder, 'encode_record', encode_record)
  output.write_text('the old file')
  with pytest.raises(rotbits_jax.ContainerError, match='mlp/up/kernel: differs'):
    rotbits_jax.encode_to_file(
      TESTDATA / NAME, output, preset='exact', check=True, overwrite=True
    )
  assert [path.name for path in tmp_path.iterdir()] == ['model.rotbits']
  assert output.read_text() == 'the old file'
