"""Configs, parameters and forward passes of dense and sliced transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from rotbits_jax.models import layout as layout
from rotbits_jax.models import names as names
from rotbits_jax.models.config import ModelConfig as ModelConfig
from rotbits_jax.models.config import RopeScaling as RopeScaling
from rotbits_jax.models.layout import check_shapes as check_shapes
from rotbits_jax.models.layout import count_elements as count_elements
from rotbits_jax.models.layout import layer_shapes as layer_shapes
from rotbits_jax.models.layout import outer_shapes as outer_shapes
from rotbits_jax.models.model import Model as Model
from rotbits_jax.models.model import Params as Params
from rotbits_jax.models.model import from_layers as from_layers
from rotbits_jax.models.model import stack_key as stack_key
from rotbits_jax.models.model import stack_ranges as stack_ranges

if TYPE_CHECKING:  # the names below, for type checkers and editors
  from rotbits_jax.models.transformer import forward as forward
  from rotbits_jax.models.transformer import logits as logits


def __getattr__(name: str) -> Any:
  # Layouts load without the forward pass.
  if name in ('forward', 'logits'):
    return getattr(importlib.import_module('rotbits_jax.models.transformer'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
