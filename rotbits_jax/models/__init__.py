"""Flax forward passes of dense and sliced transformers, and their parameters."""

from rotbits_jax.models import generation
from rotbits_jax.models.config import ModelConfig
from rotbits_jax.models.config import RopeScaling
from rotbits_jax.models.config import count_numbers
from rotbits_jax.models.config import layer_shapes
from rotbits_jax.models.config import outer_shapes
from rotbits_jax.models.model import WRITERS
from rotbits_jax.models.model import Model
from rotbits_jax.models.model import Params
from rotbits_jax.models.model import ends
from rotbits_jax.models.model import from_layers
from rotbits_jax.models.model import map_sublayers
from rotbits_jax.models.model import stack_layers
from rotbits_jax.models.model import unstack_layer
from rotbits_jax.models.transformer import Transformer
from rotbits_jax.models.transformer import logits

__all__ = [
  'WRITERS',
  'Model',
  'ModelConfig',
  'Params',
  'RopeScaling',
  'Transformer',
  'count_numbers',
  'ends',
  'from_layers',
  'generation',
  'layer_shapes',
  'logits',
  'map_sublayers',
  'outer_shapes',
  'stack_layers',
  'unstack_layer',
]
