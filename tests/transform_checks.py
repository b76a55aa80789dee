"""Functions for tests of transforms: they apply one transform and compare bits."""

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured


def apply(transform, model, **options):
  """Applies one transform to a model; returns the model and the notes."""
  rewritten, (saving,) = passes.run_chain((transform,), model, **options)
  return rewritten, saving.notes


def fast_logits(model, tokens):
  """Computes the logits of a model, with one program for all its structured forms."""
  return np.asarray(_jitted_logits(model.materialize(), tokens))


_jitted_logits = jax.jit(
  models.logits, compiler_options={'xla_backend_optimization_level': 0}
)


def bits(tree):
  """Returns type, static fields and bytes of each leaf of a PyTree, by path."""
  found = {}
  for path, leaf in structured.flatten(tree).items():
    arrays, treedef = jax.tree.flatten(jax.device_get(leaf))
    own = [(x.shape, str(x.dtype), np.asarray(x).tobytes()) for x in arrays]
    found[path] = (str(treedef), own)
  return found


def differing(a, b):
  """Returns the paths at which the bits of two PyTrees differ."""
  x, y = bits(a), bits(b)
  return sorted(path for path in x.keys() | y.keys() if x.get(path) != y.get(path))


def assert_same_bits(a, b):
  """Asserts that two models have the same leaves, bit for bit."""
  for x, y in ((a.outer(), b.outer()), *zip(a.layers(), b.layers(), strict=True)):
    assert differing(x, y) == []


def assert_same_records(actual, expected):
  """Asserts that two lists of records have the same bits and the same savings."""
  assert [record.name for record in actual] == [record.name for record in expected]
  for a, b in zip(actual, expected, strict=True):
    assert differing(a.params, b.params) == [], a.name
    assert a.savings == b.savings, a.name


def records(transform, source, **options):
  """Rewrites a source with a transform; returns all records."""
  context = passes.make_context(source)
  rewritten = passes.rewrite(context, passes.chain(transform), **options)
  return [record for some, _ in rewritten for record in some]
