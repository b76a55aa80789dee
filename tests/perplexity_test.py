"""Perplexity and KL agree with float64 NumPy. Tests of reading the text, too."""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import numpy as np
import pytest
import reference_forward
import tokenizers

from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
TEXT = (
  'The package manager keeps a list of the files that every package installs, so '
  'that they can be removed again when the administrator no longer needs them.'
)


def load(name):
  return checkpoints.load_checkpoint(TESTDATA / name)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_kl(log_p, log_q):
  return (np.exp(log_p) * (log_p - log_q)).sum(-1)


class EvaluateTest(chex.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dense = load('llama-tiny-dense').model
    cls.sliced = load('llama-tiny-sliced-head-0.25').model
    cls.tokens = np.random.default_rng(0).integers(69, size=100)

  def log_probabilities(self, name, window):
    """Returns float64 log-probabilities at every position that predicts a token."""
    path = TESTDATA / name
    tensors = checkpoints.to_tensors(load(name).model)
    config = json.loads((path / 'config.json').read_text())
    slicing = [json.loads(file.read_text()) for file in path.glob('*_0.25.json')]
    pieces = [
      reference_forward.forward(tensors, config, self.tokens[i : i + window], *slicing)[
        :-1
      ]
      for i in range(0, len(self.tokens), window)
    ]
    return log_softmax(np.concatenate(pieces))

  @parameterized.parameters(
    (49, 97),  # the last window has 2 tokens
    (33, 96),  # the last window has 1 token and predicts none
  )
  def test_perplexity_and_kl_are_those_of_the_reference(self, window, count):
    got = evaluation.evaluate(
      self.sliced, self.tokens, reference=self.dense, window=window
    )
    log_p = self.log_probabilities('llama-tiny-dense', window)
    log_q = self.log_probabilities('llama-tiny-sliced-head-0.25', window)
    starts = np.arange(0, 100, window)
    targets = np.delete(self.tokens, starts)
    nll = -log_q[np.arange(len(targets)), targets].mean()
    assert got.tokens == count == len(targets)
    np.testing.assert_allclose(got.perplexity, np.exp(nll), rtol=1e-5)
    np.testing.assert_allclose(got.kl, expected_kl(log_p, log_q).mean(), rtol=1e-5)
    both = np.exp(np.minimum(log_p, log_q)).sum(-1)
    np.testing.assert_allclose(got.ear, both.mean(), rtol=1e-6)
    assert got.kl_rerounded is None

  def test_rerounded_is_compared_with_the_reference(self):
    got = evaluation.evaluate(
      self.dense,
      self.tokens,
      reference=self.dense,
      rerounded=self.sliced,
      window=40,
    )
    other = evaluation.evaluate(
      self.sliced, self.tokens, reference=self.dense, window=40
    )
    assert (got.kl, got.ear) == (0, 1)
    assert got.kl_rerounded == pytest.approx(other.kl, rel=1e-6)

  def test_max_tokens_cuts_the_text(self):
    got = evaluation.evaluate(self.dense, self.tokens, window=40, max_tokens=60)
    cut = evaluation.evaluate(self.dense, self.tokens[:60], window=40)
    assert got == cut
    assert got.tokens == 58

  def test_unused_tokens_may_be_nan(self):
    params = jax.tree.map(np.array, self.dense.params)
    params['embed']['tokens'][0] = np.nan
    unused, tokens = self.dense.replace(params=params), np.maximum(self.tokens, 1)
    got, expected = (
      evaluation.evaluate(x, tokens, window=49) for x in (unused, self.dense)
    )
    assert got == expected

  @parameterized.parameters((512, 4), (4096, 2))
  def test_default_window(self, max_positions, windows):
    config = dataclasses.replace(self.dense.config, max_positions=max_positions)
    model = dataclasses.replace(self.dense, config=config)
    got = evaluation.evaluate(model, np.zeros(2000, np.int32))
    assert got.tokens == 2000 - windows

  def test_all_windows_share_one_compilation(self):
    # No other test compiles for this config, so that nothing is compiled before.
    config = dataclasses.replace(self.dense.config, max_positions=771)
    model = dataclasses.replace(self.dense, config=config)
    with mock.patch.object(models, 'logits', wraps=models.logits) as logits:
      evaluation.evaluate(model, self.tokens, window=7)
    assert logits.call_count == 1

  def test_a_bar_is_drawn_only_on_a_terminal(self):
    outputs = []
    for is_terminal in (False, True):
      with contextlib.redirect_stderr(io.StringIO()) as stderr:
        stderr.isatty = lambda is_terminal=is_terminal: is_terminal
        for progress in (False, True):
          evaluation.evaluate(self.dense, self.tokens, window=40, progress=progress)
          outputs.append('window' in stderr.getvalue())
    assert outputs == [False, False, False, True]

  def test_wrong_arguments_are_refused(self):
    for case, message, arguments in (
      (
        'vocabulary',
        'vocabulary of 69.* got 4096',
        {'reference': 'opt-small-sliced-0.2'},
      ),
      ('no_reference', 'reference', {'rerounded': 'llama-tiny-dense'}),
      ('one_token', 'at least 2 tokens.* got 1', {'tokens': [3]}),
      ('cut_to_one', 'at least 2 tokens.* got 1', {'max_tokens': 1}),
      ('large_id', 'token 69 ', {'tokens': [3, 69, 70]}),
      ('negative_id', 'token -1 ', {'tokens': [3, -1]}),
      ('batched', r'tokens.shape=\(1, 2\)', {'tokens': [[3, 4]]}),
      ('floats', r'dtype\(.float64.\)', {'tokens': [3.0, 4.0]}),
      ('window', 'window=1', {'window': 1}),
    ):
      with self.subTest(case=case):
        arguments = {'tokens': self.tokens} | arguments
        for name in arguments.keys() & {'reference', 'rerounded'}:
          arguments[name] = load(arguments[name]).model
        with pytest.raises(ValueError, match=message):
          evaluation.evaluate(self.dense, **arguments)


class KlDivergenceTest(chex.TestCase):
  def test_is_exact_for_small_and_large_divergences(self):
    rng = np.random.default_rng(0)
    p = np.float32(4 * rng.standard_normal((20, 500)))
    for noise in (1e-4, 1e-2, 1.0, 30.0):
      q = np.float32(p + noise * rng.standard_normal(p.shape))
      expected = expected_kl(log_softmax(p), log_softmax(q))
      got = jax.jit(evaluation.kl_divergence)(p, q)
      np.testing.assert_allclose(got, expected, rtol=3e-3)

  def test_is_finite_where_probabilities_underflow(self):
    p, q = np.float32([0, -300, 0]), np.float32([-300, 0, 0])
    got = evaluation.kl_divergence(p, q)
    np.testing.assert_allclose(got, 150, rtol=1e-2)

  def test_tokens_without_probability_count_as_they_should(self):
    p, q = np.float32([0, 1, -np.inf]), np.float32([0, 1, 2])
    for own, other, expected in (
      (p, p, 0),
      (p, q, -np.log(1 - np.exp(2 - np.log(np.exp(q).sum())))),
      (q, p, np.inf),
      (q * np.nan, q, np.nan),
      (q, q * np.nan, np.nan),
    ):
      with self.subTest(own=own, other=other):
        got = evaluation.kl_divergence(own, other)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


class EncodeTextTest(chex.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.checkpoint = load('opt-small-sliced-0.2')
    cls.files = cls.checkpoint.files

  def test_tokens_decode_to_the_text(self):
    tokens = evaluation.encode_text(self.files, TEXT)
    chex.assert_type(tokens, np.int32)
    tokenizer = tokenizers.Tokenizer.from_str(self.files['tokenizer.json'].decode())
    assert tokenizer.decode(tokens) == TEXT

  def test_text_is_likelier_than_its_tokens_shuffled(self):
    tokens = evaluation.encode_text(self.files, TEXT)
    shuffled = np.random.default_rng(0).permutation(tokens)
    text, noise = (
      evaluation.evaluate(self.checkpoint.model, x) for x in (tokens, shuffled)
    )
    assert text.perplexity < 200 < 1000 < noise.perplexity

  def test_truncation_padding_and_special_tokens_are_left_out(self):
    tokenizer = tokenizers.Tokenizer.from_str(self.files['tokenizer.json'].decode())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=200)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='</s> $A', special_tokens=[('</s>', 2)]
    )
    files = {'tokenizer.json': tokenizer.to_str().encode()}
    np.testing.assert_array_equal(
      evaluation.encode_text(files, TEXT), evaluation.encode_text(self.files, TEXT)
    )

  def test_a_text_without_words_is_refused(self):
    with pytest.raises(ValueError, match='no words'):
      evaluation.encode_text(self.files, ' \n\t ')

  @parameterized.parameters(b'{}', b'\xff')
  def test_a_broken_tokenizer_is_refused(self, content):
    with pytest.raises(ValueError, match=r'tokenizer\.json'):
      evaluation.encode_text({'tokenizer.json': content}, TEXT)

  def test_a_text_that_cannot_be_encoded_is_refused(self):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({'x': 0}, '?'))
    content = json.loads(tokenizer.to_str())
    for words in ({'x': 0}, {TEXT: 3_000_000_000}):
      content['model']['vocab'] = words
      files = {'tokenizer.json': json.dumps(content).encode()}
      with pytest.raises(ValueError, match=r'tokenizer\.json cannot encode the text'):
        evaluation.encode_text(files, TEXT)

  def test_a_missing_tokenizer_is_refused(self):
    with pytest.raises(ValueError, match=r'no tokenizer\.json'):
      evaluation.encode_text({}, TEXT)

  def test_a_missing_package_is_named(self):
    with (
      mock.patch.dict(sys.modules, {'tokenizers': None}),
      pytest.raises(ValueError, match=r'rotbits_jax\[text\]'),
    ):
      evaluation.encode_text(self.files, TEXT)
