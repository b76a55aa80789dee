"""Every order of the exported transforms keeps the function, or is refused by name."""

import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from tests import cases
from tests import random_models
from tests import transform_checks

TRANSFORMS = cases.transforms()
TOKENS = np.arange(12)[None]
OPT = {
  'model_type': 'opt',
  'hidden_size': 24,
  'ffn_dim': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'vocab_size': 40,
  'max_position_embeddings': 20,
  'word_embed_proj_dim': 24,
}
PHI = random_models.BASE | {
  'model_type': 'phi',
  'num_hidden_layers': 2,
  'partial_rotary_factor': 0.5,
}


def _sliced(dtype):
  """A sliced OPT whose embedding is tied to the head, with a low-rank kernel."""
  model = random_models.sliced(OPT, [18, 18, 18, 18, 24], dtype)
  rng = np.random.default_rng(0)
  head = np.float32(model.params['head']['kernel'])
  table = head.T @ rng.standard_normal((24, 18)).astype(np.float32) / 5
  embed = model.params['embed'] | {'tokens': table.astype(dtype)}
  layers = list(model.layers())
  for layer in layers:
    u, v = rng.standard_normal((18, 6)), rng.standard_normal((6, 32))
    pair = structured.LowRank((u / 5).astype(dtype), (v / 5).astype(dtype))
    layer['mlp']['up'] = layer['mlp']['up'] | {'kernel': pair}
  return models.from_layers(model.config, model.outer() | {'embed': embed}, layers)


MODELS = {
  'sliced': _sliced,
  'dense': lambda dtype: random_models.random_model(
    random_models.BASE | {'num_hidden_layers': 2}, dtype
  ),
  'layernorm': lambda dtype: random_models.random_model(PHI, dtype),
}


@functools.cache
def _model(name, dtype=np.float32):
  model = MODELS[name](dtype)
  return model, transform_checks.fast_logits(model, TOKENS)


def _rounding(chain):
  takes = {transform.takes for transform in chain}
  return None if takes == {'stored'} else passes.NEAREST


class PairsTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_a_pair_keeps_the_function_or_is_refused(self, name):
    model, logits = _model(name)
    for first, second in itertools.product(TRANSFORMS, TRANSFORMS):
      pair = TRANSFORMS[first], TRANSFORMS[second]
      with self.subTest(first=first, second=second):
        if second == 'residual gauge' or len({t.takes for t in pair}) > 1:
          with self.assertRaisesRegex(ValueError, f"'({first}|{second})' .*"):
            passes.chain(*pair)
          continue
        after, _ = passes.run_chain(pair, model, rounding=_rounding(pair))
        found = transform_checks.fast_logits(after, TOKENS)
        np.testing.assert_allclose(found, logits, atol=1e-4 * np.abs(logits).max())


class RefusalsTest(parameterized.TestCase):
  def test_presets_refuse_what_they_cannot_take(self):
    rotation = TRANSFORMS['rotation']
    with self.assertRaisesRegex(ValueError, "embedding' takes weights as they"):
      presets.exact(transforms=(rotation,))
    with self.assertRaisesRegex(ValueError, "'residual gauge' must be the first"):
      presets.free(transforms=(TRANSFORMS['residual gauge'],))
    with self.assertRaisesRegex(ValueError, 'embedding. takes weights as they are'):
      presets.near(transforms=(TRANSFORMS['exactly tied embedding'],))
    presets.free(transforms=(rotation,))

  @parameterized.parameters('layer', 'outer')
  def test_a_large_error_ends_the_work_in_every_preset(self, where):
    def damage(path, params):
      params[path] = params[path] * 1.5
      return passes.note(path, params[path], error=0.5)

    damaging = {
      'layer': lambda context, state, index, params: (
        params,
        [damage('mlp/down/kernel', params)],
      ),
      'outer': lambda context, state, params: (
        params,
        [damage('embed/tokens', params)],
      ),
    }
    transform = passes.Transform('damage', **{where: damaging[where]})
    tensor = {'layer': 'mlp/down/kernel', 'outer': 'embed/tokens'}[where]
    message = f'damage: {tensor} has a relative error of 0.5'
    model, _ = _model('dense', np.float16)
    for make in (presets.free, presets.near, presets.exact):
      with self.assertRaisesRegex(ValueError, message):
        rotbits_jax.encode(model, preset=make(transforms=(transform,)))
    allowed = transform._replace(most_error=0.6)
    rotbits_jax.encode(model, preset=presets.free(transforms=(allowed,)))


if __name__ == '__main__':
  absltest.main()
