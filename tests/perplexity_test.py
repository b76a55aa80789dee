"""Perplexity and KL agree with float64 NumPy; texts become tokens."""

import json

import jax
import numpy as np
import pytest
import reference_forward
import tokenizers

from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from tests import cases

DENSE, SLICED = 'llama-tiny-dense', 'llama-tiny-sliced-head-0.25'
TOKENS = np.random.default_rng(0).integers(69, size=100)
TEXT = (
  'The package manager keeps a list of the files that every package installs, so '
  'that they can be removed again when the administrator no longer needs them.'
)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_kl(log_p, log_q):
  return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def log_probabilities(name, window):
  """Returns float64 log-probabilities at every position that predicts a token."""
  path = cases.TESTDATA / name
  tensors = checkpoints.to_tensors(cases.load(name).model)
  config = json.loads((path / 'config.json').read_text())
  slicing = [json.loads(file.read_text()) for file in path.glob('*_0.25.json')]
  windows = [TOKENS[i : i + window] for i in range(0, len(TOKENS), window)]
  logits = [reference_forward.forward(tensors, config, x, *slicing) for x in windows]
  return log_softmax(np.concatenate([x[:-1] for x in logits]))


@pytest.mark.parametrize(
  ('window', 'count'),
  [
    (49, 97),  # the last window has 2 tokens
    (33, 96),  # the last window has 1 token and predicts none
  ],
)
def test_perplexity_and_kl_are_those_of_the_reference(window, count):
  dense, sliced = cases.load(DENSE).model, cases.load(SLICED).model
  found = evaluation.evaluate(sliced, TOKENS, reference=dense, window=window)
  log_p, log_q = (log_probabilities(name, window) for name in (DENSE, SLICED))
  targets = np.delete(TOKENS, np.arange(0, 100, window))
  loss = -log_q[np.arange(len(targets)), targets].mean()
  assert found.tokens == count == len(targets)
  np.testing.assert_allclose(found.perplexity, np.exp(loss), rtol=1e-5)
  np.testing.assert_allclose(found.kl, expected_kl(log_p, log_q).mean(), rtol=1e-5)
  both = np.exp(np.minimum(log_p, log_q)).sum(-1)
  np.testing.assert_allclose(found.ear, both.mean(), rtol=1e-6)
  again = evaluation.evaluate(
    dense, TOKENS, reference=dense, rerounded=sliced, window=window
  )
  assert (again.kl, again.ear) == (0, 1)
  assert again.kl_rerounded == pytest.approx(found.kl, rel=1e-6)


def test_kl_is_exact_for_small_and_large_divergences():
  rng = np.random.default_rng(0)
  p = np.float32(4 * rng.standard_normal((20, 500)))
  for noise in (1e-4, 1e-2, 1.0, 30.0):
    q = np.float32(p + noise * rng.standard_normal(p.shape))
    expected = expected_kl(log_softmax(p), log_softmax(q))
    found = jax.jit(evaluation.kl_divergence)(p, q)
    np.testing.assert_allclose(found, expected, rtol=3e-3)
  # Some tokens have no probability in one or both of them.
  p, q = np.float32([0, 1, -np.inf]), np.float32([0, 1, 2])
  for first, second, expected in ((p, p, 0), (q, p, np.inf), (q * np.nan, q, np.nan)):
    assert np.array_equal(
      evaluation.kl_divergence(first, second), np.float32(expected), equal_nan=True
    )


def test_tokens_of_a_text(capfd):
  checkpoint = cases.load('opt-small-sliced-0.2')
  tokens = evaluation.encode_text(checkpoint.files, TEXT)
  tokenizer = tokenizers.Tokenizer.from_str(checkpoint.files['tokenizer.json'].decode())
  assert tokens.dtype == np.int32
  assert tokenizer.decode(tokens) == TEXT
  shuffled = np.random.default_rng(0).permutation(tokens)
  text, noise = (evaluation.evaluate(checkpoint.model, x) for x in (tokens, shuffled))
  assert text.perplexity < 200 < 1000 < noise.perplexity
  # Nothing is truncated, padded or added.
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=200)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='</s> $A', special_tokens=[('</s>', 2)]
  )
  files = {'tokenizer.json': tokenizer.to_str().encode()}
  np.testing.assert_array_equal(evaluation.encode_text(files, TEXT), tokens)
  # What makes Rust panic, which is no Exception.
  normalizer = {'type': 'Precompiled', 'precompiled_charsmap': ''}
  broken = json.loads(files['tokenizer.json']) | {'normalizer': normalizer}
  with pytest.raises(ValueError, match='cannot be used'):
    evaluation.encode_text({'tokenizer.json': json.dumps(broken).encode()}, TEXT)
  assert capfd.readouterr().err == ''
