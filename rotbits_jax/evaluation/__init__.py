"""Measurement of models on a text."""

from rotbits_jax.evaluation.perplexity import Evaluation as Evaluation
from rotbits_jax.evaluation.perplexity import agreement as agreement
from rotbits_jax.evaluation.perplexity import evaluate as evaluate
from rotbits_jax.evaluation.perplexity import kl_divergence as kl_divergence
from rotbits_jax.evaluation.text import encode_text as encode_text
