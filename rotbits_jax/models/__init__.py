"""Configs, parameters and forward passes of dense and sliced transformers."""

import importlib
from typing import Any

from rotbits_jax.models import layout
from rotbits_jax.models import names
from rotbits_jax.models.config import ModelConfig
from rotbits_jax.models.config import RopeScaling
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

__all__ = [
  'Model',
  'ModelConfig',
  'Params',
  'RopeScaling',
  'count_elements',
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
  'unstack_layer',
]


def __getattr__(name: str) -> Any:
  # Layouts load without the forward pass.
  if name in ('forward', 'logits'):
    return getattr(importlib.import_module('rotbits_jax.models.transformer'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
