"""The meaning of the parameters' axes in each family, and the symmetries."""

import dataclasses
import math

from absl.testing import absltest

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.models import layout

LLAMA = {
  'model_type': 'llama',
  'hidden_size': 24,
  'intermediate_size': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'vocab_size': 31,
  'max_position_embeddings': 32,
  'rope_theta': 50.0,
}
OPT = {
  'model_type': 'opt',
  'hidden_size': 24,
  'ffn_dim': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'vocab_size': 31,
  'max_position_embeddings': 20,
  'word_embed_proj_dim': 24,
}
PHI = LLAMA | {'model_type': 'phi', 'partial_rotary_factor': 2 / 3}
LLAMA = LLAMA | {'rms_norm_eps': 1e-3}
CONFIGS = {
  'llama': LLAMA,
  'llama_tied': LLAMA | {'tie_word_embeddings': True},
  'phi3': LLAMA | {'model_type': 'phi3', 'sliding_window': 5},
  'qwen2': LLAMA | {'model_type': 'qwen2'},
  'qwen3': LLAMA | {'model_type': 'qwen3', 'head_dim': 6},
  'opt': OPT,
  'phi': PHI,
}


def _config(name, *, sliced=False):
  config = checkpoints.parse_config(CONFIGS[name], None)
  if not sliced:
    return config
  widths = (18,) * (len(config.segment_widths) - 1) + (24,)
  return config.sliced_to(widths)


# ---- the table: kernels, biases and norms of a layer ---------------------------------

ROTARY_ATTENTION = {
  'attention/query/kernel': (0, 'query'),
  'attention/key/kernel': (0, 'key'),
  'attention/value/kernel': (0, 'key'),
  'attention/out/kernel': ('query', 1),
}
QKV_BIASES = {
  'attention/query/bias': ('query',),
  'attention/key/bias': ('key',),
  'attention/value/bias': ('key',),
}
GATED_MLP = {
  'mlp/gate/kernel': (1, 'neuron'),
  'mlp/up/kernel': (1, 'neuron'),
  'mlp/down/kernel': ('neuron', -1),
}
QK_NORMS = {
  'attention/query_norm/scale': ('head',),
  'attention/key_norm/scale': ('head',),
}
RMS_NORMS = {'attention_norm/scale': ('norm',), 'mlp_norm/scale': ('norm',)}
SHORTCUTS = {'attention_shortcut/kernel': (0, 1), 'mlp_shortcut/kernel': (1, -1)}
LLAMA_LAYER = ROTARY_ATTENTION | GATED_MLP
OPT_LAYER = (
  ROTARY_ATTENTION
  | QKV_BIASES
  | {
    'attention/out/bias': (1,),
    'mlp/up/kernel': (1, 'neuron'),
    'mlp/up/bias': ('neuron',),
    'mlp/down/kernel': ('neuron', -1),
    'mlp/down/bias': (-1,),
  }
)
# Attention and MLP read the same segment, and both write the next segment.
PHI_LAYER = OPT_LAYER | {
  'attention/out/kernel': ('query', -1),
  'attention/out/bias': (-1,),
  'mlp/up/kernel': (0, 'neuron'),
}
EMBED, HEAD = {'embed/tokens': ('vocabulary', 0)}, {'head/kernel': (-1, 'vocabulary')}
NORM_BIASES = {'attention_norm/bias': ('norm',), 'mlp_norm/bias': ('norm',)}
FINAL = {'final_norm/scale': ('norm',)}

TABLE = (
  ('llama', False, LLAMA_LAYER | RMS_NORMS, EMBED | FINAL | HEAD),
  ('llama', True, LLAMA_LAYER | SHORTCUTS, EMBED | HEAD),
  ('llama_tied', False, LLAMA_LAYER | RMS_NORMS, EMBED | FINAL),
  ('llama_tied', True, LLAMA_LAYER | SHORTCUTS, EMBED | HEAD),
  ('phi3', False, LLAMA_LAYER | RMS_NORMS, EMBED | FINAL | HEAD),
  ('phi3', True, LLAMA_LAYER | SHORTCUTS, EMBED | HEAD),
  ('qwen2', False, LLAMA_LAYER | QKV_BIASES | RMS_NORMS, EMBED | FINAL | HEAD),
  ('qwen3', False, LLAMA_LAYER | QK_NORMS | RMS_NORMS, EMBED | FINAL | HEAD),
  ('qwen3', True, LLAMA_LAYER | QK_NORMS | SHORTCUTS, EMBED | HEAD),
  (
    'opt',
    False,
    OPT_LAYER | RMS_NORMS | NORM_BIASES,
    EMBED | FINAL | {'embed/positions': ('position', 0), 'final_norm/bias': ('norm',)},
  ),
  (
    'opt',
    True,
    OPT_LAYER | SHORTCUTS,
    EMBED | HEAD | {'embed/positions': ('position', 0), 'head/bias': ('vocabulary',)},
  ),
  (
    'phi',
    False,
    PHI_LAYER | {'attention_norm/scale': ('norm',), 'attention_norm/bias': ('norm',)},
    EMBED | FINAL | HEAD | {'final_norm/bias': ('norm',), 'head/bias': ('vocabulary',)},
  ),
  (
    'phi',
    True,
    PHI_LAYER | {'attention_shortcut/kernel': (0, -1)},
    EMBED | HEAD | {'head/bias': ('vocabulary',)},
  ),
)

S = layout.Symmetries
EVERY = S(segments=True, values=True, queries=True)
SYMMETRIES = {
  ('llama', False): EVERY._replace(segments=False, stream=True),
  ('llama', True): EVERY,
  ('llama_tied', False): EVERY._replace(segments=False),
  ('llama_tied', True): EVERY,
  ('phi3', False): EVERY._replace(segments=False, stream=True),
  ('phi3', True): EVERY,
  ('qwen2', False): EVERY._replace(segments=False, stream=True),
  ('qwen3', False): EVERY._replace(segments=False, stream=True, queries=False),
  ('qwen3', True): EVERY._replace(queries=False),
  ('opt', False): EVERY._replace(segments=False, key_bias=True),
  ('opt', True): EVERY._replace(key_bias=True),
  ('phi', False): EVERY._replace(segments=False),
  ('phi', True): EVERY,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _NewConfig(models.ModelConfig):
  """A config with a switch that `layout.symmetries` does not know."""

  residual_scale: float = 1.0


class LayoutTest(absltest.TestCase):
  def test_axes_sizes_and_ends_are_those_of_the_table(self):
    for name, sliced, layer, outer in TABLE:
      with self.subTest(name=name, sliced=sliced):
        config = _config(name, sliced=sliced)
        self.assertEqual(layout.layer_axes(config), layer)
        self.assertEqual(layout.outer_axes(config), outer)
        self._assert_sizes(config, layer, outer)
        for path, axes in layer.items():
          # Each linear layer reads or writes a segment, but not both.
          if path.endswith('/kernel') and 'shortcut' not in path:
            first, last = (isinstance(axis, int) for axis in axes[-2:])
            self.assertNotEqual(first, last)

  def _assert_sizes(self, config, layer, outer):
    """Checks the shapes of the parameters, and how many elements they have."""
    sizes = {
      'query': 24,
      'key': config.num_kv_heads * 6,
      'neuron': 20,
      'vocabulary': 31,
      'position': 22,
      'norm': 24,
      'head': 6,
    }
    elements = 0
    for axes, shapes, widths in (
      (layer, models.layer_shapes(config, 1), config.layer_widths(1)),
      (outer, models.outer_shapes(config), config.segment_widths),
    ):
      expected = {
        path: tuple(widths[x] if isinstance(x, int) else sizes[x] for x in own)
        for path, own in axes.items()
      }
      self.assertEqual(structured.flatten(shapes), expected)
      elements += sum(map(math.prod, expected.values()))
    first = structured.flatten(models.layer_shapes(config, 0))
    elements += sum(map(math.prod, first.values()))
    self.assertEqual(models.count_elements(config), elements)

  def test_parallel_blocks_read_one_norm(self):
    for name, norm in (('llama', 'mlp_norm'), ('phi', 'attention_norm')):
      config = _config(name)
      self.assertEqual(layout.norm_of(config, 'attention'), 'attention_norm')
      self.assertEqual(layout.norm_of(config, 'mlp'), norm)


class SymmetriesTest(absltest.TestCase):
  def test_symmetries_are_those_of_the_table(self):
    for (name, sliced), expected in SYMMETRIES.items():
      config = _config(name, sliced=sliced)
      self.assertEqual(layout.symmetries(config), expected, (name, sliced))
      # A config with a field that is not known has none.
      fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
      self.assertEqual(layout.symmetries(_NewConfig(**fields)), layout.Symmetries())
    self.assertFalse(any(layout.Symmetries()))

  def test_a_norm_that_is_not_known_has_none(self):
    other = dataclasses.replace(_config('llama'), norm='groupnorm')
    self.assertFalse(any(layout.symmetries(other)))


if __name__ == '__main__':
  absltest.main()
