"""Configs, parameters and forward passes of dense and sliced transformers."""

from rotbits_jax.models import layout
from rotbits_jax.models import names
from rotbits_jax.models.config import ModelConfig
from rotbits_jax.models.config import RopeScaling
from rotbits_jax.models.fisher import Factors
from rotbits_jax.models.fisher import fisher_factors
from rotbits_jax.models.layout import count_elements
from rotbits_jax.models.layout import layer_shapes
from rotbits_jax.models.layout import outer_shapes
from rotbits_jax.models.layout import record_shapes
from rotbits_jax.models.model import Model
from rotbits_jax.models.model import Params
from rotbits_jax.models.model import from_layers
from rotbits_jax.models.model import materialize
from rotbits_jax.models.model import stack_key
from rotbits_jax.models.model import stack_layers
from rotbits_jax.models.model import stack_ranges
from rotbits_jax.models.model import unstack_layer
from rotbits_jax.models.transformer import Layers
from rotbits_jax.models.transformer import forward
from rotbits_jax.models.transformer import logits
from rotbits_jax.models.transformer import streams

__all__ = [
  'Factors',
  'Layers',
  'Model',
  'ModelConfig',
  'Params',
  'RopeScaling',
  'count_elements',
  'fisher_factors',
  'forward',
  'from_layers',
  'layer_shapes',
  'layout',
  'logits',
  'materialize',
  'names',
  'outer_shapes',
  'record_shapes',
  'stack_key',
  'stack_layers',
  'stack_ranges',
  'streams',
  'unstack_layer',
]
