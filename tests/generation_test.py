"""Generation: the cache agrees with whole forward passes; sampling; the command."""

import dataclasses
import functools
import json
import pathlib
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models
import tokenizers
import word_checkpoints

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import configs
from rotbits_jax.cli import generate as generate_command
from rotbits_jax.models import generation
from rotbits_jax.models import transformer

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FIXTURES = sorted(path.parent.name for path in TESTDATA.glob('*/ref_logits.npz'))

# Compilation takes half the time; the slower program does not matter here.
fast_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@fast_jit
def incremental_logits(model, first, rest):
  """Returns the logits of `[B, T]` tokens at once, then `[N, B]` tokens one by one."""
  batch, length = first.shape
  cache = generation.empty_cache(model, batch, length + len(rest) + 3)
  begin = models.forward(model.params, model.config, first, cache=cache)

  def step(cache, tokens):
    own = models.forward(model.params, model.config, tokens[:, None], cache=cache)
    return own.cache, own.logits[:, 0]

  cache, end = jax.lax.scan(step, begin.cache, rest)
  return jnp.concatenate([begin.logits, end.swapaxes(0, 1)], axis=1), cache.length


def mixed_model():
  """Makes a sliced Llama with a sliding window, two groups and thin shortcuts."""
  model = random_models.sliced_llama((20, 20, 20, 20, 20, 14, 24))
  layers = list(model.layers())
  rng = np.random.default_rng(0)
  for layer in layers[:2]:
    thin = np.tril(0.2 * rng.standard_normal((20, 3))).astype(np.float16)
    shortcut = structured.IdentityMinusGram(thin, np.zeros((20, 0), np.float16), 20)
    layer['attention_shortcut'] = {'kernel': shortcut}
  config = dataclasses.replace(model.config, sliding_window=3)
  return models.from_layers(config, model.outer(), layers)


class CacheTest(chex.TestCase):
  @parameterized.parameters(FIXTURES)
  def test_logits_are_those_of_pytorch(self, name):
    model = checkpoints.load_checkpoint(TESTDATA / name).model
    expected = np.load(TESTDATA / name / 'ref_logits.npz')
    tokens = expected['input_ids']
    logits, length = incremental_logits(model, tokens[:, :41], tokens[:, 41:].T)
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)
    assert length == tokens.shape[1]

  def test_logits_are_those_of_the_whole_sequence(self):
    model = mixed_model()
    assert model.stacks == (range(2), range(2, 3))
    tokens = np.random.default_rng(1).integers(40, size=(2, 12))
    logits, _ = incremental_logits(model, tokens[:, :5], tokens[:, 5:].T)
    expected = fast_jit(models.logits)(model, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


class SampleTest(chex.TestCase):
  def draw(self, logits, count, **options):
    keys = jax.random.split(jax.random.key(0), count)
    sample = lambda key: generation.sample(jnp.asarray(logits), key, **options)
    return np.asarray(jax.vmap(sample)(keys))

  @parameterized.parameters((1.0, None), (0.5, None), (2.0, 3))
  def test_frequencies_are_the_softmax(self, temperature, top_k):
    logits = np.array([0.0, 1.0, -1.0, 0.5, -3.0])
    draws = self.draw(logits, 20000, temperature=temperature, top_k=top_k)
    weights = np.exp(logits / temperature)
    if top_k is not None:
      weights[np.argsort(logits)[:-top_k]] = 0
    expected = weights / weights.sum()
    got = np.bincount(draws, minlength=5) / draws.size
    # The bound is five standard deviations.
    assert (abs(got - expected) <= 5 * np.sqrt(expected / draws.size)).all(), got

  def test_without_temperature_it_is_the_likeliest(self):
    draws = self.draw([0.0, 3.0, 2.999], 50, temperature=0.0)
    assert (draws == 1).all()


class GenerateTest(chex.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.opt = checkpoints.load_checkpoint(TESTDATA / 'opt-small-sliced-0.2').model
    cls.llama = checkpoints.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
    # The prompt is read in two pieces; the second is not full.
    cls.prompt = np.random.default_rng(0).integers(60, size=generation.PREFILL + 9)

  def generate(self, **options):
    return list(generation.generate(self.llama, self.prompt, **options))

  @parameterized.parameters('opt', 'llama')
  def test_greedy_tokens_are_those_of_whole_forward_passes(self, name):
    model = getattr(self, name)
    tokens = list(self.prompt)
    logits_of = fast_jit(models.logits)
    for _ in range(6):
      padded = np.pad(tokens, (0, 80 - len(tokens)))[None]
      tokens.append(int(jnp.argmax(logits_of(model, padded)[0, len(tokens) - 1])))
    got = list(generation.generate(model, self.prompt, max_tokens=6))
    assert got == tokens[len(self.prompt) :]

  def test_the_prompt_reaches_the_last_positions(self):
    # More positions than one piece of the prompt has, and less than two pieces.
    positions = np.asarray(self.opt.params['embed']['positions'])[:75]
    outer = {
      **self.opt.params,
      'embed': self.opt.params['embed'] | {'positions': positions},
    }
    config = dataclasses.replace(
      self.opt.config, max_positions=73, learned_positions=75
    )
    model = dataclasses.replace(self.opt, config=config, params=outer)
    prompt = self.prompt[:70]
    token = int(jnp.argmax(models.logits(model, prompt[None])[0, -1]))
    assert next(generation.generate(model, prompt, max_tokens=3)) == token

  def test_draws_depend_on_the_key_alone(self):
    draw = lambda seed: self.generate(
      max_tokens=10, temperature=1.0, key=jax.random.key(seed)
    )
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len(set(draw(0))) > 2

  def test_a_stop_token_ends_it_and_is_left_out(self):
    whole = self.generate(max_tokens=6)
    stop = whole[3]
    got = self.generate(max_tokens=6, stop_tokens=[stop])
    assert got == whole[: whole.index(stop)]

  def test_it_compiles_for_the_prompt_and_for_a_token(self):
    model = random_models.sliced_llama((24, 24, 24))
    with mock.patch.object(
      transformer, 'forward', wraps=transformer.forward
    ) as forward:
      for length, max_tokens in ((3, 4), (17, 30), (40, 2)):
        tokens = np.zeros(length, np.int32)
        list(generation.generate(model, tokens, max_tokens=max_tokens))
    assert forward.call_count == 2  # once for each trace

  def test_predictions_that_are_not_finite_are_refused(self):
    scale = np.full_like(self.llama.params['final_norm']['scale'], np.nan)
    params = self.llama.params | {'final_norm': {'scale': scale}}
    model = dataclasses.replace(self.llama, params=params)
    with pytest.raises(ValueError, match='not finite'):
      next(generation.generate(model, self.prompt, max_tokens=6))

  def test_unused_tokens_may_be_nan(self):
    params = jax.tree.map(np.array, self.llama.params)
    params['embed']['tokens'][0] = np.nan
    unused, prompt = self.llama.replace(params=params), np.maximum(self.prompt, 1)
    got, expected = (
      list(generation.generate(x, prompt, max_tokens=2)) for x in (unused, self.llama)
    )
    assert got == expected

  def test_refused_before_the_first_token(self):
    for options, match in (
      ({'tokens': np.zeros((1, 3), int)}, r'tokens must be \[T\] integers.*\(1, 3\)'),
      ({'tokens': np.zeros(3)}, 'tokens must be .*float64'),
      ({'tokens': np.zeros(0, int)}, 'the prompt has no tokens'),
      ({'tokens': np.array([3, 69])}, 'token 69 is outside .* vocabulary of 69'),
      ({'tokens': np.array([-1])}, 'token -1 is outside'),
      ({'max_tokens': 0}, 'max_tokens must be positive, got 0'),
      ({'max_tokens': 10**6}, 'positions, got 3 tokens and max_tokens=1000000'),
      ({'temperature': -0.5}, 'temperature must be finite and not negative, got -0.5'),
      ({'temperature': float('nan')}, 'temperature must be finite'),
      ({'temperature': 0.5}, 'a temperature of 0.5 needs a key'),
      ({'top_k': 0}, 'top_k must be from 1 to 69, got 0'),
      ({'top_k': 70}, 'top_k must be from 1 to 69, got 70'),
    ):
      with self.subTest(options=options):
        arguments = {'tokens': np.zeros(3, int), 'max_tokens': 4} | options
        with pytest.raises(ValueError, match=match):
          generation.generate(self.llama, **arguments)


class TestStopTokens:
  def test_stop_tokens(self, subtests):
    for files, expected in (
      ({}, ()),
      ({'config.json': {'eos_token_id': 2}}, (2,)),
      ({'config.json': {'eos_token_id': None}}, ()),
      ({'generation_config.json': {'eos_token_id': [7, 0]}}, (7, 0)),
      (
        {
          'config.json': {'eos_token_id': 2},
          'generation_config.json': {'eos_token_id': 3},
        },
        (3,),
      ),
      ({'config.json': {'eos_token_id': 2}, 'generation_config.json': {}}, (2,)),
    ):
      with subtests.test(files=files):
        files = {name: json.dumps(content).encode() for name, content in files.items()}
        assert configs.stop_tokens(files) == expected

  def test_refused(self, subtests):
    for content, match in (
      (b'{"eos_token_id": "x"}', r"config\.json: eos_token_id is \['x'\]"),
      (b'[]', r'config\.json: expected an object'),
      (b'{', r'config\.json: not JSON'),
    ):
      with (
        subtests.test(content=content),
        pytest.raises(checkpoints.CheckpointError, match=match),
      ):
        configs.stop_tokens({'config.json': content})


def byte_tokenizer():
  """Makes a tokenizer.json with a token for each byte and one special token."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(['<end>'])
  return tokenizer


class TestStreamText:
  def test_pieces_are_whole_characters(self):
    tokenizer = byte_tokenizer()
    files = {'tokenizer.json': tokenizer.to_str().encode()}
    encode = lambda text: tokenizer.encode(text).ids
    tokens = encode('aé 漢<end>!')
    pieces = list(generate_command.stream_text(files, encode('before'), tokens))
    assert pieces == ['a', 'é', ' ', '漢', '!']

  def test_the_prompt_may_end_within_a_character(self):
    tokenizer = byte_tokenizer()
    files = {'tokenizer.json': tokenizer.to_str().encode()}
    tokens = tokenizer.encode('漢b').ids
    pieces = list(generate_command.stream_text(files, tokens[:1], tokens[1:]))
    assert pieces == ['漢', 'b']

  def test_bytes_that_are_no_character_change_what_was_yielded(self):
    names = [f'<0x{i:02X}>' for i in range(256)]
    vocabulary = {name: i for i, name in enumerate((*names, 'a', '<unk>'))}
    model = tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token='<unk>')
    tokenizer = tokenizers.Tokenizer(model)
    steps = tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
    tokenizer.decoder = tokenizers.decoders.Sequence([*steps])
    files = {'tokenizer.json': tokenizer.to_str().encode()}
    tokens = [0x0A, 0xE2, vocabulary['a'], vocabulary['a']]
    text = ''.join(generate_command.stream_text(files, [vocabulary['a']], tokens))
    assert text.startswith('\n')
    assert text.endswith('aa')


@pytest.fixture(scope='module', name='directory')
def _directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('readable')
  return word_checkpoints.copy_with_tokenizer('llama-tiny-dense', directory)


@pytest.fixture(name='run')
def _run(rotbits):
  """Runs `rotbits generate ARGS`; returns exit code, stdout and stderr."""
  return functools.partial(rotbits, 'generate')


class TestCommand:
  @pytest.mark.parametrize('kind', ['directory', 'file'])
  def test_it_prints_the_words_that_follow(self, run, directory, tmp_path, kind):
    checkpoint = rotbits_jax.load_checkpoint(directory)
    path = directory
    if kind == 'file':
      path = tmp_path / 'model.rotbits'
      data = rotbits_jax.encode(
        checkpoint.model, preset='exact', files=checkpoint.files
      )
      path.write_bytes(data)
    code, out, err = run(f'--model={path}', '--prompt=w3 w5', '--max_tokens=80')
    tokens = list(
      generation.generate(
        checkpoint.model,
        np.array([3, 5]),
        max_tokens=80,
        stop_tokens=configs.stop_tokens(checkpoint.files),
      )
    )
    assert (code, err) == (0, '')
    assert out.split() == [f'w{token}' for token in tokens]

  def test_the_seed_decides_the_draws(self, run, directory):
    arguments = [f'--model={directory}', '--prompt=w3 w5', '--temperature=2.0']
    draw = lambda seed: run(*arguments, '--max_tokens=80', f'--seed={seed}')
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)

  def test_bad_input_is_one_line_and_exit_code_2(self, run, directory, subtests):
    for arguments, match in (
      (['--prompt= '], '--prompt has no words'),
      (['--prompt=w1', '--max_tokens=100000'], 'positions, got 1 tokens'),
      (['--prompt=w1', '--temperature=-1'], 'temperature'),
      (['--prompt=w1', '--top_k=0'], 'top_k must be from 1 to 69'),
      (['--prompt=w1', f'--seed={1 << 64}'], '--seed'),
      ([], 'prompt'),
    ):
      with subtests.test(arguments=arguments):
        code, out, err = run(f'--model={directory}', *arguments)
        assert (code, out) == (2, '')
        assert err.startswith('rotbits generate: ')
        assert err.count('\n') == 1
        assert match in err

  def test_a_checkpoint_without_tokenizer(self, run):
    code, _, err = run(f'--model={TESTDATA / "llama-tiny-dense"}', '--prompt=x')
    assert code == 2
    assert 'no tokenizer.json' in err
