"""The published experiments: config files in the repository's folder `configs`.

Reference: Getting Free Bits Back from Rotational Symmetries in LLMs, arXiv 2410.01309.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax.system import config_files


class Experiment(NamedTuple):
  """A model that is sliced and coded, with the figures of the paper.

  Attributes:
    name: name of the dense model.
    config: config of the dense model.
    slicing: the part of the hidden size that slicing removes.
    bits_back: the paper's reduction in percent, by the sparsity of slicing.
  """

  name: str
  config: models.ModelConfig
  slicing: float
  bits_back: dict[float, float]


def experiment(fields: Mapping[str, Any]) -> Experiment:
  """Makes an experiment of the field `experiment` of a config file.

  Raises:
    CheckpointError: if its `model` is not the config.json of a known family.
    ValueError: if a field is missing, or has a wrong type.
  """
  try:
    return Experiment(
      name=fields['name'],
      config=checkpoints.parse_config(dict(fields['model'])),
      slicing=fields['slicing'],
      bits_back=dict(fields['published']),
    )
  except KeyError as error:
    raise ValueError(f'the experiment has no field {error}') from error
  except TypeError as error:
    raise ValueError(f'the experiment has a field of a wrong type: {error}') from error


@functools.cache
def experiments() -> dict[str, Experiment]:
  """Returns the experiments in the folder `configs`, by the names of their models."""
  configs = map(config_files.load, config_files.paths().values())
  found = [experiment(x['experiment']) for x in configs if 'experiment' in x]
  size = lambda x: (x.config.family, models.count_elements(x.config))
  return {x.name: x for x in sorted(found, key=size)}
