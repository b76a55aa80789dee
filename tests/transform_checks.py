"""What tests of transforms need: one transform applied, and models compared by bits."""

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.symmetries import transform as transform_lib


def apply(transform, model, **options):
  """The model that one transform leaves, and its notes."""
  rewritten, (saving,) = symmetries.run_chain((transform,), model, **options)
  return rewritten, saving.notes


def apply_outer(transform, model):
  """What is outside the layers, as a transform without state leaves it, and notes.

  It is not rounded yet, in contrast to what `apply` returns.
  """
  context = symmetries.make_context(model, stored_as=model.stored_as)
  outer, (saving,) = transform.outer(context, transform.init(context), model.outer())
  return outer, saving.notes


def fast_logits(model, tokens):
  """Logits by a program that is compiled in half the time."""
  fast_compile = {'xla_backend_optimization_level': 0}
  return np.asarray(
    jax.jit(models.logits, compiler_options=fast_compile)(model, tokens)
  )


def bits(tree):
  """The kind, the static fields and the bytes of each leaf of a PyTree, by path."""
  found = {}
  for path, leaf in structured.flatten(tree).items():
    arrays, treedef = jax.tree.flatten(jax.device_get(leaf))
    own = [(x.shape, str(x.dtype), np.asarray(x).tobytes()) for x in arrays]
    found[path] = (str(treedef), own)
  return found


def differing(a, b):
  """The paths of two PyTrees whose bits differ."""
  x, y = bits(a), bits(b)
  return sorted(path for path in x.keys() | y.keys() if x.get(path) != y.get(path))


def assert_same_bits(a, b):
  """Two models have the same leaves, bit for bit."""
  for x, y in ((a.outer(), b.outer()), *zip(a.layers(), b.layers(), strict=True)):
    assert differing(x, y) == []


def assert_same_units(actual, expected):
  """Two lists of units have the same leaves, bit for bit, and the same savings."""
  assert [unit.name for unit in actual] == [unit.name for unit in expected]
  for a, b in zip(actual, expected, strict=True):
    assert differing(a.params, b.params) == [], a.name
    assert a.savings == b.savings, a.name


def units(transform, source, **options):
  """All units of a source that a transform rewrites."""
  context = symmetries.make_context(source)
  rewritten = transform_lib.rewrite(context, transform, **options)
  return [unit for some, _ in rewritten for unit in some]
