"""The examples run."""

import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

from examples import generate
from examples import mixture
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'
TESTDATA = pathlib.Path(__file__).parent / 'testdata'


def test_orbax_checkpoint(capsys):
  runpy.run_path(str(EXAMPLES / 'orbax_checkpoint.py'), run_name='__main__')
  assert capsys.readouterr().out


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of qwix
def test_qwix_quantised(capsys):
  pytest.importorskip('qwix')
  runpy.run_path(str(EXAMPLES / 'qwix_quantised.py'), run_name='__main__')
  assert capsys.readouterr().out.count('every bit comes back') == 2


def test_a_mixture_is_coded_at_its_ideal_rate():
  assert 0.99 < mixture.main(steps=32, batch=32) < 1.02


def test_generate_takes_the_most_likely_tokens(tmp_path):
  folder = TESTDATA / 'opt-small-sliced-0.2'
  text = generate.main(str(folder), 'The system', 4)
  model = rotbits_jax.load_checkpoint(folder).model
  tokens = generate.generate(model, [7, 8, 9], 3)
  for count, token in enumerate(tokens):
    logits = models.logits(model, jnp.array([[7, 8, 9, *tokens[:count]]]))
    assert token == int(logits[0, -1].argmax())
  rotbits_jax.encode_to_file(folder, tmp_path / 'x.rotbits', preset='exact')
  assert generate.main(str(tmp_path / 'x.rotbits'), 'The system', 4) == text


def test_a_gguf_file_becomes_a_checkpoint(tmp_path):
  gguf = pytest.importorskip('gguf')
  from examples import gguf_to_safetensors

  model = rotbits_jax.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
  config, tensors = model.config, checkpoints.to_tensors(model)
  names = {value: key for key, value in gguf_to_safetensors.NAMES.items()}
  writer = gguf.GGUFWriter(tmp_path / 'x.gguf', 'llama')
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.max_positions)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_token_list([f'<{i}>' for i in range(config.vocab_size)])
  for name, tensor in tensors.items():
    layer, _, inner = name.removeprefix('model.layers.').partition('.')
    is_inside = name.startswith('model.layers.')
    stem = (inner if is_inside else name).removesuffix('.weight')
    heads = {'attn_q': config.num_heads, 'attn_k': config.num_kv_heads}
    array = np.float32(tensor)
    if names[stem] in heads:  # llama.cpp's order of the rows
      halves = array.reshape(heads[names[stem]], 2, -1, array.shape[-1])
      array = halves.swapaxes(1, 2).reshape(array.shape)
    prefix = f'blk.{layer}.' if is_inside else ''
    writer.add_tensor(f'{prefix}{names[stem]}.weight', array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()

  gguf_to_safetensors.convert(tmp_path / 'x.gguf', tmp_path / 'folder', 'float16')
  converted = rotbits_jax.load_checkpoint(tmp_path / 'folder').model
  for name, tensor in checkpoints.to_tensors(converted).items():
    np.testing.assert_array_equal(tensor, np.float16(tensors[name]), err_msg=name)
  assert converted.config == config
