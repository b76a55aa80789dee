"""Strict reading of `config.json`: every attribute is used, checked or refused.

An attribute is a key of the JSON object with its value. The functions after the class
read the attributes that several families share, and make fields of a
`models.ModelConfig` of them. To refuse is to raise a `CheckpointError`.

Raises:
  UnsupportedError: if JSON is too long, or has an infinite number or the like, see
    `schema.LimitError`. Configs of families that are not known have these.
  CheckpointError: if JSON is damaged, or an attribute is refused.
"""

import math
from typing import Any

from rotbits_jax import models
from rotbits_jax.checkpoints import errors
from rotbits_jax.system import schema

MOST_LAYERS = 1 << 12
"""A bound for layers, because a config is read before tensors bound their number."""

_MISSING: Any = object()
_MOST_CONFIG = 1 << 20  # bytes; configs have a few thousand


def parse_json(content: bytes, where: str, *, most: int = _MOST_CONFIG) -> Any:
  """Parses a JSON file of a checkpoint.

  The limit bounds memory: the parsed value may take 30 times as much as its text.

  Args:
    content: of the file.
    where: name of the file in error messages.
    most: the greatest size of the content in bytes.

  Returns:
    The JSON value.
  """
  if len(content) > most:
    raise errors.UnsupportedError(
      f'{where}: the JSON has {len(content)} bytes, more than {most}'
    )
  try:
    return schema.parse(content)
  except schema.LimitError as e:
    raise errors.UnsupportedError(f'{where}: {e}') from e
  except ValueError as e:
    raise errors.CheckpointError(f'{where}: {e}') from e


def parse_object(
  content: bytes, where: str, *, most: int = _MOST_CONFIG
) -> dict[str, Any]:
  """Parses a JSON file of a checkpoint that must be an object; see `parse_json`."""
  parsed = parse_json(content, where, most=most)
  if not isinstance(parsed, dict):
    raise errors.CheckpointError(
      f'{where}: expected an object, got {errors.cut(repr(parsed))}'
    )
  return parsed


class Attributes:
  """A JSON object that remembers which attributes have been read.

  `take` marks an attribute as read, as do the methods that check a value. `finish`
  refuses the object if an attribute was not read.

  Attributes:
    where: name of the object in error messages.
  """

  def __init__(self, values: Any, where: str):
    if not isinstance(values, dict):
      raise errors.CheckpointError(
        f'{where}: expected an object, got {errors.cut(repr(values))}'
      )
    self._values, self._left, self.where = values, set(values), where

  def __contains__(self, name: str) -> bool:
    return name in self._values

  def take(self, name: str, default: Any = _MISSING) -> Any:
    """Returns the value of an attribute, or the default if the attribute is absent."""
    self._left.discard(name)
    value = self._values.get(name, default)
    if value is _MISSING:
      raise errors.CheckpointError(f'{self.where}: {name} is missing')
    return value

  def demand(self, *names: str) -> None:
    """Refuses the object if one of these attributes is absent."""
    for name in names:
      self.take(name)

  def size(self, name: str, default: Any = _MISSING, *, most: int = 2**31 - 1) -> int:
    """Returns a positive integer; null stands for the default, if there is one."""
    value = self.take(name, default)
    if value is None and default is not _MISSING:
      value = default
    if type(value) is not int or not 0 < value <= most:
      self.refuse(name, value, f'an integer from 1 to {most}')
    return value

  def number(self, name: str, default: Any = _MISSING) -> float:
    """Returns a positive finite number."""
    value = self.take(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
      self.refuse(name, value, 'a positive number')
    return float(value)

  def boolean(self, name: str, default: Any = _MISSING) -> bool:
    value = self.take(name, default)
    if not isinstance(value, bool):
      self.refuse(name, value, 'true or false')
    return value

  def choice(self, name: str, choices: tuple[Any, ...], default: Any = _MISSING) -> Any:
    """Returns a string that must be one of the choices."""
    value = self.take(name, default)
    if not isinstance(value, str) or value not in choices:
      self.refuse(name, value, f'one of {", ".join(map(str, choices))}')
    return value

  def require(self, **values: Any) -> None:
    """Refuses the object if one of these attributes is present with another value."""
    for name, expected in values.items():
      value = self.take(name, expected)
      if value != expected or isinstance(value, bool) != isinstance(expected, bool):
        self.refuse(name, value, repr(expected))

  def finish(self, ignored: frozenset[str] = frozenset()) -> None:
    """Refuses the object if an attribute was neither read nor is among `ignored`."""
    for name in sorted(self._left - ignored):
      self.refuse(name, self._values[name], 'no attribute of this name')

  def refuse(self, name: str, value: Any, expected: str) -> None:
    """Raises a `CheckpointError` that names an attribute, its value and `expected`."""
    raise errors.CheckpointError(
      f'{self.where}: {errors.cut(name)} is {errors.cut(repr(value))}; '
      f'supported: {expected}'
    )


# ---- the attributes that several families share --------------------------------------


def rotary_gated(config: Attributes, **switches: Any) -> models.ModelConfig:
  """Makes the config of a family that resembles Llama.

  Args:
    config: the attributes of `config.json`.
    switches: see `rotary`.
  """
  return rotary(
    config,
    activation=activation(config, 'hidden_act', 'silu'),
    gated_mlp=True,
    norm='rmsnorm',
    norm_eps=norm_eps(config),
    tied_head=config.boolean('tie_word_embeddings', False),
    **switches,
  )


def rotary(
  config: Attributes,
  rotary_factor: float | None = None,
  **switches: Any,
) -> models.ModelConfig:
  """Makes the config of a family with rotary positions.

  Args:
    config: the attributes of `config.json`.
    rotary_factor: see `rope.positions`.
    switches: the fields in which the family differs from others.
  """
  heads = config.size('num_attention_heads')
  return decoder(
    config,
    intermediate_size=config.size('intermediate_size'),
    num_kv_heads=config.size('num_key_value_heads', heads),
    max_positions=config.size('max_position_embeddings', 2048),
    **positions(config, rotary_factor),
    **switches,
  )


def decoder(config: Attributes, **fields: Any) -> models.ModelConfig:
  """Makes a config from the attributes that all families have, and further fields."""
  hidden = config.size('hidden_size')
  layers = config.size('num_hidden_layers', most=MOST_LAYERS)
  segments = layers if fields.get('parallel_block') else 2 * layers
  return models.ModelConfig(
    hidden_size=hidden,
    num_layers=layers,
    num_heads=config.size('num_attention_heads'),
    head_dim=head_dim(config),
    vocab_size=config.size('vocab_size'),
    segment_widths=(hidden,) * (segments + 1),
    **fields,
  )


def require_full_attention(config: Attributes) -> None:
  """Refuses a Qwen with a window in some layers."""
  config.demand('max_position_embeddings', 'num_key_value_heads')
  config.require(use_sliding_window=False)
  for unused in ('sliding_window', 'max_window_layers'):
    config.take(unused, None)
  types = config.take('layer_types', None)
  full = ['full_attention'] * config.size('num_hidden_layers', most=MOST_LAYERS)
  if types is not None and types != full:
    config.refuse('layer_types', types, "'full_attention' for every layer")


def norm_eps(config: Attributes) -> float:
  return config.number('rms_norm_eps', 1e-6)


def sliding_window(config: Attributes) -> int | None:
  if config.take('sliding_window', None) is None:
    return None
  return config.size('sliding_window')


def activation(config: Attributes, name: str, default: str) -> Any:
  known = ('relu', 'gelu_new', 'gelu_pytorch_tanh', 'silu')
  function = config.choice(name, known, default)
  # Two names of one function.
  return 'gelu_new' if function == 'gelu_pytorch_tanh' else function


def head_dim(config: Attributes) -> int:
  """Returns the width of a head."""
  if config.take('head_dim', None) is not None:
    return config.size('head_dim')
  hidden, heads = config.size('hidden_size'), config.size('num_attention_heads')
  if hidden % heads:
    raise errors.CheckpointError(
      f'{config.where}: num_attention_heads {heads} does not divide '
      f'hidden_size {hidden}'
    )
  return hidden // heads


def positions(config: Attributes, factor: float | None) -> dict[str, Any]:
  """Reads the settings of RoPE.

  transformers 5 has all settings in `rope_parameters`. Earlier versions have the
  settings of the scaling in `rope_scaling`, and the other settings beside it. If both
  have one, it must be the same: versions of transformers differ in which of two they
  take.

  Args:
    config: the attributes of `config.json`.
    factor: the part of a head that RoPE rotates, if no attribute sets it; None if
      transformers rotates the whole head whatever an attribute says.

  Returns:
    The fields of `models.ModelConfig` that are RoPE's.
  """
  settings = config
  gathered = config.take('rope_parameters', None) is not None
  if gathered:
    config.require(rope_scaling=None)
  if gathered or config.take('rope_scaling', None) is not None:
    name = 'rope_parameters' if gathered else 'rope_scaling'
    settings = Attributes(config.take(name), f'{config.where}: {name}')
  scaling = None if settings is config else _scaling(settings, config)
  theta = settings.number('rope_theta', config.take('rope_theta', 10000.0))
  config.require(rope_theta=theta)
  if factor is None:
    for attributes_with_factor in (config, settings):
      attributes_with_factor.require(partial_rotary_factor=1.0)
    factor = 1.0
  else:
    factor = config.take('partial_rotary_factor', factor)
    factor = settings.number('partial_rotary_factor', factor)
    config.require(partial_rotary_factor=factor)
  if settings is not config:
    settings.finish()
  rotary_dim = int(head_dim(config) * min(factor, 1))
  if factor > 1 or rotary_dim % 2 or rotary_dim == 0:
    settings.refuse(
      'partial_rotary_factor', factor, 'a part of the head with an even, positive width'
    )
  return {'rope_theta': theta, 'rotary_dim': rotary_dim, 'rope_scaling': scaling}


def _scaling(settings: Attributes, config: Attributes) -> models.RopeScaling | None:
  older = settings.take('type', 'default')
  rope_type = settings.choice('rope_type', ('default', 'linear', 'llama3'), older)
  settings.require(type=rope_type)
  if rope_type == 'default':
    return None
  factor = settings.number('factor')
  if rope_type == 'linear':
    return models.RopeScaling(type_name='linear', factor=factor)
  original = settings.size('original_max_position_embeddings')
  if config.take('original_max_position_embeddings', None) is not None:
    # Versions of transformers differ in which of two they take.
    config.require(original_max_position_embeddings=original)
  return models.RopeScaling(
    type_name='llama3',
    factor=factor,
    low_freq_factor=settings.number('low_freq_factor'),
    high_freq_factor=settings.number('high_freq_factor'),
    original_positions=original,
  )
