"""What a model predicts of a text: perplexity and KL divergence."""

from rotbits_jax.evaluation.perplexity import Evaluation
from rotbits_jax.evaluation.perplexity import evaluate
from rotbits_jax.evaluation.perplexity import kl_divergence
from rotbits_jax.evaluation.text import encode_text

__all__ = ['Evaluation', 'encode_text', 'evaluate', 'kl_divergence']
