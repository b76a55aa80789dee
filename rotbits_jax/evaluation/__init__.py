"""Measurement of models on a text."""

from rotbits_jax.evaluation.held_out import Measured
from rotbits_jax.evaluation.perplexity import Evaluation
from rotbits_jax.evaluation.perplexity import agreement
from rotbits_jax.evaluation.perplexity import evaluate
from rotbits_jax.evaluation.perplexity import kl_divergence
from rotbits_jax.evaluation.text import encode_text

__all__ = [
  'Evaluation',
  'Measured',
  'agreement',
  'encode_text',
  'evaluate',
  'kl_divergence',
]
