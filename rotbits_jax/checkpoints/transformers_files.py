"""Sliced models as transformers loads them: a folder of weights, config and code.

transformers has no sliced models. A folder may bring the code of its model, though, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs it. The code
is in `remote_code`. The package copies these files and never imports them, because they
need PyTorch.

The tensors have the names that transformers gives them. A shortcut is one of

    attn_shortcut.weight    a matrix, `[out, in]`
    attn_shortcut.b, .c     the factors of `structured.IdentityMinusGram`

The factors are for a shortcut that multiplies faster with them than with the matrix;
`c` is left out if it has no columns.
"""

from collections.abc import Iterator, Mapping
import importlib.resources
import json
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints.contents import CONFIG

Ranks = Mapping[str, tuple[int, int]]

_CODE = importlib.resources.files('rotbits_jax.checkpoints') / 'remote_code'
_SHARED_CODE = ('configuration_sliced.py', 'sliced_modules.py')

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
}


def entries(
  config: models.ModelConfig, layer: int | None, ranks: Ranks
) -> Iterator[tensors_lib.Entry]:
  """Yields the tensors of a layer, or outside the layers if `layer` is None.

  Args:
    config: config of a sliced model.
    layer: the layer.
    ranks: the columns of B and of C of each shortcut of the model that is stored as
      factors, by its path. The paths of its factors are those of `factor_paths`.
  """
  prefix = tensors_lib.unit_name(layer)
  for entry in tensors_lib.entries(config, layer):
    if not entry.name.endswith(families.SHORTCUT_SUFFIX):
      yield entry
      continue
    name, path = entry.name.removesuffix(families.SHORTCUT_SUFFIX), entry.paths[0]
    rows, columns = entry.shape
    if prefix + path not in ranks:
      shape = columns, rows
      yield tensors_lib.Entry(f'{name}.weight', (path,), (columns,), shape, True)
      continue
    own = ranks[prefix + path]
    for factor, width in zip(factor_paths(path), own, strict=True):
      if width:
        shape = rows, width
        name_of_factor = f'{name}.{factor[-1]}'
        yield tensors_lib.Entry(name_of_factor, (factor,), (rows,), shape, False)


def factor_paths(path: str) -> tuple[str, str]:
  """Returns the paths of B and C of the shortcut with a path."""
  parent = path.rpartition('/')[0]
  return f'{parent}/b', f'{parent}/c'


def split(params: Mapping[str, Any], prefix: str, ranks: Ranks) -> dict[str, Any]:
  """Replaces shortcuts by their factors.

  Args:
    params: leaves by path.
    prefix: what precedes these paths in the paths of the whole model.
    ranks: see `entries`.

  Raises:
    ValueError: if a shortcut that `ranks` names has no factors.
  """
  found: dict[str, Any] = {}
  for path, leaf in params.items():
    if prefix + path not in ranks:
      found[path] = leaf
      continue
    if not isinstance(leaf, structured.IdentityMinusGram):
      raise ValueError(f'{prefix}{path}: expected factors, got {type(leaf).__name__}')
    factors = zip(factor_paths(path), (leaf.b, leaf.c), strict=True)
    found |= {name: factor for name, factor in factors if factor.size}
  return found


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
    ValueError: if there is no code for the family.
  """
  if config.family not in _CLASSES:
    raise ValueError(f'there is no code for transformers of the family {config.family}')
  named = {name: content for name, content in files.items() if name != f'{stem}.json'}
  dense = attributes.parse_json(files[CONFIG], CONFIG)
  # `AutoTokenizer` knows the tokenizer of a dense model by the model's type, and of a
  # type that it does not know by the class that one of these files names.
  dense = {'tokenizer_class': _CLASSES[config.family][1]} | dense
  if _TOKENIZER in files:
    named.setdefault(_TOKENIZER_CONFIG, _json(_TOKENIZER_SETTINGS))
  named[CONFIG] = _json(dense | _settings(config, ranks, dtype))
  for name in (*_SHARED_CODE, f'modeling_sliced_{config.family}.py'):
    named[name] = (_CODE / name).read_bytes()
  return named


def _settings(
  config: models.ModelConfig, ranks: Ranks, dtype: np.dtype
) -> dict[str, Any]:
  """Returns the fields of `config.json` that slicing changes."""
  name = f'Sliced{_CLASSES[config.family][0]}'
  modeling = f'modeling_sliced_{config.family}'
  causal = f'{name}ForCausalLM'
  return {
    'architectures': [causal],
    'auto_map': {
      'AutoConfig': f'configuration_sliced.{name}Config',
      'AutoModel': f'{modeling}.{name}Model',
      'AutoModelForCausalLM': f'{modeling}.{causal}',
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
  sublayers = ('attention', 'mlp')[: config.segments_per_layer]
  return [
    ranks.get(f'{tensors_lib.unit_name(layer)}{sublayer}_shortcut/kernel')
    for layer in range(config.num_layers)
    for sublayer in sublayers
  ]


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2, sort_keys=True) + '\n').encode()
