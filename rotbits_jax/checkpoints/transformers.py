"""Sliced models as transformers loads them: a folder of weights, config and code.

transformers has no sliced models. A folder may bring the code of its model, though, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs it. The code
is `remote_code/modeling_sliced.py`. The package copies this file and never imports it,
because it needs PyTorch.

The tensors have the names that transformers gives them. A shortcut is one of

    attn_shortcut.weight    a matrix, `[out, in]`
    attn_shortcut.b, .c     the factors of `structured.IdentityMinusGram`

The factors are for a shortcut that multiplies faster with them than with the matrix;
`c` is left out if it has no columns.
"""

from collections.abc import Iterator, Mapping, Sequence
import importlib.resources
import itertools
import json
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import config as config_lib
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints.families import CONFIG

Ranks = Mapping[str, tuple[int, int]]

_MODELING = 'modeling_sliced'
_CODE = importlib.resources.files('rotbits_jax.checkpoints') / 'remote_code'
_TOKENIZER, _TOKENIZER_CONFIG = 'tokenizer.json', 'tokenizer_config.json'
_TOKENIZER_SETTINGS = {
  'model_input_names': ['input_ids', 'attention_mask'],
  'tokenizer_class': 'PreTrainedTokenizerFast',
}

# The part of transformers' class names that stands for a family, and its tokenizer.
_CLASSES = {
  'llama': ('Llama', 'LlamaTokenizer'),
  'mistral': ('Mistral', 'LlamaTokenizer'),
  'opt': ('OPT', 'GPT2Tokenizer'),
  'phi': ('Phi', 'CodeGenTokenizer'),
  'phi3': ('Phi3', 'LlamaTokenizer'),
  'qwen2': ('Qwen2', 'Qwen2Tokenizer'),
  'qwen3': ('Qwen3', 'Qwen2Tokenizer'),
}


class GramEntry(NamedTuple):
  """The two tensors of a shortcut that is stored as factors.

  Attributes:
    name: name of the shortcut.
    shape: shape of the matrix `[in, out]`.
    paths: path of the shortcut, alone.
    ranks: the columns of B and of C.
  """

  name: str
  shape: tuple[int, ...]
  paths: tuple[str, ...]
  ranks: tuple[int, int]

  def stored(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the factors that have columns, by their names."""
    widths = zip('bc', self.ranks, strict=True)
    return {f'{self.name}.{x}': (self.shape[0], width) for x, width in widths if width}

  def parameters(self) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the shortcut by its path."""
    return {self.paths[0]: self.shape}

  def write(self, leaves: Sequence[Any]) -> dict[str, list[np.ndarray]]:
    """Returns the factors by name, each as one array.

    Raises:
      ValueError: if the shortcut has not these factors.
    """
    if thin_shortcuts({self.name: leaves[0]}) != {self.name: self.ranks}:
      raise ValueError(f'{self.name}: expected factors with {self.ranks} columns')
    return {name: [np.asarray(getattr(leaves[0], name[-1]))] for name in self.stored()}


def thin_shortcuts(leaves: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
  """Returns the columns of B and of C of the thin shortcuts among leaves, by path."""
  return {
    path: (leaf.b.shape[-1], leaf.c.shape[-1])
    for path, leaf in leaves.items()
    if isinstance(leaf, structured.IdentityMinusGram) and leaf.is_thin
  }


def entries(
  config: models.ModelConfig, ranks: Ranks
) -> Iterator[tensors_lib.ExpectedTensor | GramEntry]:
  """Yields the tensors of a sliced model.

  Args:
    config: config of the model.
    ranks: the columns of B and of C of each shortcut that is stored as factors, by its
      path.
  """
  for entry in itertools.chain(*tensors_lib.entries(config).values()):
    name, path = entry.name.removesuffix(families.SHORTCUT_SUFFIX), entry.paths[0]
    if name == entry.name:
      yield entry
    elif path in ranks:
      yield GramEntry(name, entry.shape, entry.paths, ranks[path])
    else:
      shape = entry.shape[::-1]
      yield tensors_lib.ExpectedTensor(
        f'{name}.weight', shape, entry.paths, shape[:1], True
      )


def sidecars(
  config: models.ModelConfig,
  files: Mapping[str, bytes],
  *,
  stem: str | None,
  ranks: Ranks,
  dtype: np.dtype,
) -> dict[str, bytes]:
  """Returns the files beside the weights: config, code, tokenizer and others.

  Args:
    config: config of a sliced model.
    files: the sidecar files of the checkpoint by name, with the `config.json` of the
      model before slicing.
    stem: name of the slicing JSON, which is left out.
    ranks: see `entries`.
    dtype: dtype that the model gets when it is loaded.

  Raises:
    ValueError: if there is no code for the family, or `config.json` is no object.
  """
  if config.family not in _CLASSES:
    raise ValueError(f'there is no code for transformers of the family {config.family}')
  named = {name: content for name, content in files.items() if name != f'{stem}.json'}
  dense = _older_rope(config_lib.parse_object(files[CONFIG], CONFIG), config)
  # `AutoTokenizer` knows the tokenizer of a dense model by the model's type, and of a
  # type that it does not know by the class that one of these files names.
  dense = {'tokenizer_class': _CLASSES[config.family][1]} | dense
  if _TOKENIZER in files:
    named.setdefault(_TOKENIZER_CONFIG, _json(_TOKENIZER_SETTINGS))
  dense.pop('dtype', None)  # transformers 5 prefers it to the name that 4 knows, too
  named[CONFIG] = _json(dense | _settings(config, ranks, dtype))
  named[f'{_MODELING}.py'] = (_CODE / f'{_MODELING}.py').read_bytes()
  return named


def _older_rope(dense: dict[str, Any], config: models.ModelConfig) -> dict[str, Any]:
  """Returns a `config.json` with the settings of RoPE where transformers 4 reads them.

  transformers 5 gathers them in `rope_parameters`, and reads them at both places.

  Args:
    dense: the `config.json` of the model before slicing.
    config: config of the sliced model.
  """
  gathered = dense.get('rope_parameters')
  if not isinstance(gathered, dict):
    return dense
  scaling = dict(gathered)
  older = {name: value for name, value in dense.items() if name != 'rope_parameters'}
  for name in ('rope_theta', 'partial_rotary_factor'):
    if name in scaling:
      older[name] = scaling.pop(name)
  if config.rope_scaling is not None:
    older['rope_scaling'] = scaling
  return older


def _settings(
  config: models.ModelConfig, ranks: Ranks, dtype: np.dtype
) -> dict[str, Any]:
  """Returns the fields of `config.json` that slicing changes."""
  name = f'Sliced{_CLASSES[config.family][0]}'
  causal = f'{name}ForCausalLM'
  return {
    'architectures': [causal],
    'auto_map': {
      'AutoConfig': f'{_MODELING}.{name}Config',
      'AutoModel': f'{_MODELING}.{name}Model',
      'AutoModelForCausalLM': f'{_MODELING}.{causal}',
    },
    'model_type': f'sliced_{config.family}',
    'segment_widths': list(config.segment_widths),
    'shortcut_ranks': _shortcut_ranks(config, ranks),
    'tie_word_embeddings': False,
    'torch_dtype': dtype.name,
  }


def _shortcut_ranks(
  config: models.ModelConfig, ranks: Ranks
) -> list[tuple[int, int] | None]:
  """Returns the ranks of all shortcuts in the order of the segments."""
  sublayers = models.layout.SUBLAYERS[: config.segments_per_layer]
  return [
    ranks.get(f'{models.names.layer(layer)}/{sublayer}_shortcut/kernel')
    for layer in range(config.num_layers)
    for sublayer in sublayers
  ]


def _json(value: Any) -> bytes:
  """Returns the content of a JSON file."""
  return (json.dumps(value, indent=2, sort_keys=True) + '\n').encode()
