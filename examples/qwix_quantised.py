"""Stores a model that qwix quantised: its tree as it is, and dequantised to bfloat16.

  pip install qwix && python examples/qwix_quantised.py

The tree of qwix is a PyTree, whose codes `exact` stores at their entropy. A dequantised
checkpoint, which any framework reads, takes about as many bytes, because `exact` finds
codes and scales again. All bits come back from both.
"""

import jax
import jax.numpy as jnp
import qwix

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.models import flax

TOKENS = jnp.arange(14).reshape(2, 7)


def quantised(model: models.Model, rule: qwix.QuantizationRule) -> models.Params:
  """Returns the parameters for `flax.LinenTransformer` after `qwix.quantize_model`."""
  module = flax.LinenTransformer.like(model)
  module = qwix.quantize_model(module, qwix.PtqProvider([rule]))
  abstract = jax.eval_shape(module.init, jax.random.key(0), TOKENS)['params']
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), model.params)
  for key, spec in abstract.items():
    quantise = lambda x, spec=spec: qwix.quantize_params(x, spec)
    if key.startswith('layers.'):  # a stack; qwix has seen one layer of it
      one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), spec)
      quantise = jax.vmap(lambda x, one=one: qwix.quantize_params(x, one))
    params[key] = quantise(params[key])
  return params


def main() -> None:
  path = checkpoints.example('llama-tiny-dense')
  model = rotbits_jax.load_checkpoint(path).model
  rule = qwix.QuantizationRule(weight_qtype='int4', tile_size=32)
  params = quantised(model, rule)
  is_code = lambda x: isinstance(x, qwix.QArray)
  dense = jax.tree.map(
    lambda x: (qwix.dequantize(x) if is_code(x) else x).astype(jnp.bfloat16),
    params,
    is_leaf=is_code,
  )
  for name, tree in {'the tree of qwix': params, 'dequantised': dense}.items():
    data = rotbits_jax.encode(tree)
    assert structured.same_bits(rotbits_jax.decode(data, like=tree), tree)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(tree))
    print(f'{name}: {nbytes:,} bytes => {len(data):,}, every bit comes back')


if __name__ == '__main__':
  main()
