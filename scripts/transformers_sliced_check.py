"""Checks that sliced models run in transformers as they run in this package.

  bash scripts/transformers.sh [VERSION]

The models are Microsoft's sliced checkpoints in tests/testdata, encoded with `exact`
and `free`, and random sliced models of all families whose segments differ in width.
Each is written with the format `transformers`, those of files as snapshots, and loaded
by transformers. Its logits
must be those of our forward pass, and Microsoft's. The other checks compare the model
with itself: its cache, padding, dtypes, devices, gradients and copies.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import os
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from scripts import transformers_check

TESTDATA = pathlib.Path(__file__).parents[1] / 'tests/testdata'
FIXTURES = sorted(path.parent.name for path in TESTDATA.glob('*sliced*/config.json'))
WIDTHS = (24, 24, 32, 20, 28)  # of the segments of a random model with D = 32
SETTINGS: dict[str, dict[str, Any]] = {
  'llama': {
    'attention_bias': True,
    'mlp_bias': True,
    'head_dim': 16,
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 16,
    },
  },
  'mistral': {'sliding_window': 12},
  'phi3': {'sliding_window': 12, 'rms_norm_eps': 1e-5, 'eos_token_id': 2},
}
MOST_ERROR = 1e-5  # relative to the greatest logit, in float32
MOST_ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
PROMPT, GENERATED = 8, 12  # tokens

VERSION = tuple(int(x) for x in transformers.__version__.split('.')[:2])
DTYPE = 'dtype' if VERSION >= (4, 56) else 'torch_dtype'  # name of the argument
# Earlier versions load no code from a folder with a dot in its name.
COPIES = ('first', 'second.copy' if VERSION >= (4, 57) else 'second')


class Case(NamedTuple):
  """A sliced model in a folder, and the logits that it must have.

  Attributes:
    folder: the folder, in the format `transformers`.
    tokens: `[B, T]`.
    expected: float32 `[B, T, V]` by the name of who computed them.
  """

  folder: pathlib.Path
  tokens: torch.Tensor
  expected: dict[str, np.ndarray]


def fixture(name: str, preset: str, folder: pathlib.Path) -> Case:
  """Encodes one of Microsoft's checkpoints; the folder is a snapshot."""
  reference = np.load(TESTDATA / name / 'ref_logits.npz')
  file = folder.with_name('file')
  rotbits_jax.encode_to_file(TESTDATA / name, file, preset=preset)
  os.environ['ROTBITS_JAX_CACHE'] = str(folder.parent)
  folder = rotbits_jax.snapshot(file)
  tokens = reference['input_ids']
  expected = {'ours': logits_of(rotbits_jax.decode(file), tokens)}
  if preset == 'exact':
    expected['microsoft'] = reference['logits']
  return Case(folder, torch.tensor(tokens).long(), expected)


def random_case(family: str, folder: pathlib.Path) -> Case:
  """Makes a sliced model in which all parameters are random."""
  sizes = transformers_check.KNOWN[family] | SETTINGS.get(family, {})
  dense_json = {'model_type': family, 'num_hidden_layers': 2} | sizes
  dense = checkpoints.parse_config(dense_json)
  config = dense.sliced_to(WIDTHS[: len(dense.segment_widths)])
  rng = np.random.default_rng(0)

  def draw(shape: tuple[int, ...]) -> np.ndarray:
    return (shape[0] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)

  def gram(shape: tuple[int, ...]) -> Any:
    """Makes a shortcut with values of its spectrum below and above 1."""
    rows, columns = shape
    return structured.IdentityMinusGram(draw((rows, 3)), draw((rows, 2)), columns)

  is_shape = lambda x: isinstance(x, tuple)
  outer = jax.tree.map(draw, models.outer_shapes(config), is_leaf=is_shape)
  layers = []
  for index in range(config.num_layers):
    shapes = models.layer_shapes(config, index)
    layer = jax.tree.map(draw, shapes, is_leaf=is_shape)
    for name in ('attention_shortcut', 'mlp_shortcut'):
      shape = shapes.get(name, {'kernel': (1, 0)})['kernel']
      if shape[0] <= shape[1]:
        layer[name]['kernel'] = gram(shape)
    layers.append(layer)
  model = models.from_layers(config, outer, layers)
  files = {
    'config.json': transformers_check.to_json(dense_json),
    'sliced_0.25.json': transformers_check.to_json(checkpoints.slicing_json(config)),
  }
  checkpoint = checkpoints.Checkpoint(model, files, 'sliced_0.25')
  checkpoints.save_checkpoint(checkpoint, folder, 'transformers')
  tokens = rng.integers(config.vocab_size, size=(2, 40))
  return Case(folder, torch.tensor(tokens), {'ours': logits_of(model, tokens)})


def logits_of(model: models.Model, tokens: np.ndarray) -> np.ndarray:
  """Returns the logits of our forward pass on the numbers that a folder has.

  A structured leaf is rounded when it becomes a matrix, except the factors of a thin
  shortcut, which a folder has, too.
  """

  def written(leaf: Any) -> Any:
    thin = isinstance(leaf, structured.IdentityMinusGram) and leaf.is_thin
    return leaf if thin else structured.materialize(leaf)

  layers = [
    jax.tree.map(written, layer, is_leaf=structured.is_structured)
    for layer in model.layers()
  ]
  outer = models.materialize(model.outer())
  same = models.from_layers(model.config, outer, layers)
  return np.asarray(models.logits(same, tokens))


def load(folder: pathlib.Path, **options: Any) -> Any:
  """Loads a model, and raises `AssertionError` if transformers warns of anything."""
  options[DTYPE] = options.pop('dtype', torch.float32)
  with no_warnings():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder, trust_remote_code=True, output_loading_info=True, **options
    )
  found = {name: keys for name, keys in info.items() if keys}
  assert not found, f'{folder.name}: {found}'
  return model.eval()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
  """Raises `AssertionError` if transformers logs a warning."""
  seen: list[str] = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: seen.append(record.getMessage())
  logger = logging.getLogger('transformers')
  logger.addHandler(handler)
  try:
    yield
  finally:
    logger.removeHandler(handler)
  assert not seen, seen


def run(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
  """Returns the logits in float32."""
  with torch.no_grad():
    return model(tokens, use_cache=False, **options).logits.float()


def training_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
  """Returns the loss, with the same dropout every time."""
  torch.manual_seed(0)
  return model(tokens, labels=tokens, use_cache=False).loss


def generate(model: Any, tokens: torch.Tensor, **options: Any) -> Any:
  """Generates the most likely tokens, with their logits."""
  return model.generate(
    tokens,
    **({'attention_mask': torch.ones_like(tokens), 'pad_token_id': 0} | options),
    max_new_tokens=GENERATED,
    do_sample=False,
    return_dict_in_generate=True,
    output_logits=True,
  )


def difference(got: Any, expected: Any) -> float:
  """Returns the greatest difference relative to the greatest expected value."""
  got, expected = np.asarray(got), np.asarray(expected)
  return float(np.abs(got - expected).max() / np.abs(expected).max())


def check_logits(case: Case) -> str:
  found = {}
  for attention in ('eager', 'sdpa'):
    model = load(case.folder, attn_implementation=attention)
    logits = run(model, case.tokens)
    for name, expected in case.expected.items():
      found[f'{name}, {attention}'] = error = difference(logits, expected)
      assert error <= MOST_ERROR, f'{name}, {attention}: logits are off by {error:.2g}'
  return ', '.join(f'{name} {error:.1e}' for name, error in found.items())


def check_base_model(case: Case) -> str:
  """Checks `AutoModel`, and what it returns besides the logits."""
  whole = load(case.folder, attn_implementation='eager')
  base = whole.base_model
  with torch.no_grad():
    output = base(case.tokens, output_hidden_states=True, output_attentions=True)
    logits = whole.lm_head(output.last_hidden_state)
  assert difference(logits, case.expected['ours']) <= MOST_ERROR
  widths = whole.config.segment_widths
  step = (len(widths) - 1) // whole.config.num_hidden_layers
  assert [x.shape[-1] for x in output.hidden_states] == widths[::step]
  assert len(output.attentions) == whole.config.num_hidden_layers
  transformers.logging.set_verbosity_error()  # the head is unexpected
  alone = transformers.AutoModel.from_pretrained(
    case.folder, trust_remote_code=True, **{DTYPE: torch.float32}
  )
  transformers.logging.set_verbosity_warning()
  with torch.no_grad():
    again = alone.eval()(case.tokens).last_hidden_state
  assert difference(again, output.last_hidden_state) <= MOST_ERROR
  return 'same'


def check_generation(case: Case) -> str:
  """Checks the cache and left padding: one token at a time, as if all at once."""
  model = load(case.folder)
  prompt = case.tokens[:, :PROMPT]
  model.generation_config.eos_token_id = None
  found = generate(model, prompt)
  tokens, step_by_step = found.sequences, torch.stack(found.logits, 1)
  at_once = run(model, tokens)[:, PROMPT - 1 : -1]
  error = difference(step_by_step, at_once)
  assert error <= MOST_ERROR, f'with the cache, logits are off by {error:.2g}'
  assert torch.equal(generate(model, prompt, use_cache=False).sequences, tokens)

  padded = torch.zeros_like(prompt[:, :5]), prompt
  mask = torch.cat([padded[0], torch.ones_like(prompt)], 1)
  inputs = torch.cat(padded, 1)
  found = generate(model, inputs, attention_mask=mask)
  assert torch.equal(found.sequences[:, 5:], tokens)
  shifted = difference(torch.stack(found.logits, 1), step_by_step)
  assert shifted <= MOST_ERROR, f'with padding, logits are off by {shifted:.2g}'

  stop = int(tokens[0, PROMPT + 2])
  ended = generate(model, prompt[:1], eos_token_id=stop).sequences[0, PROMPT:]
  assert stop not in ended[:-1], 'generation did not stop at the end of a text'
  assert ended[-1] == stop
  return f'cache {error:.1e}, left padding {shifted:.1e}'


def check_dtypes(case: Case) -> str:
  found = []
  for dtype, most in MOST_ROUNDING.items():
    model = load(case.folder, dtype=dtype)
    assert {x.dtype for x in model.parameters()} == {dtype}
    error = difference(run(model, case.tokens), case.expected['ours'])
    assert error <= most, f'{dtype}: logits are off by {error:.2g}'
    found.append(f'{str(dtype).removeprefix("torch.")} {error:.1e}')
  file = checkpoints.open_plain(case.folder)
  stored = {tensor.dtype.name for tensor in file.tensors.values()}
  automatic = {str(x.dtype) for x in load(case.folder, dtype='auto').parameters()}
  assert automatic == {f'torch.{name}' for name in stored}
  return ', '.join(found)


def check_devices(case: Case) -> str:
  """Checks that `device_map` keeps layers whole; the disk stands for a device."""
  model = load(case.folder)
  size = sum(x.nbytes for x in model.parameters())
  expected = run(model, case.tokens)
  with tempfile.TemporaryDirectory() as offloaded:
    model = load(
      case.folder,
      device_map='auto',
      max_memory={'cpu': int(0.8 * size)},
      offload_folder=offloaded,
    )
    places = model.hf_device_map
    assert len(set(map(str, places.values()))) == 2, places
    split = [x for x in places if '.layers.' in x and not x.split('.')[-1].isdigit()]
    assert not split, f'layers are split: {split}'
    assert torch.equal(run(model, case.tokens), expected)
  return f'{len(places)} parts'


def check_copies(case: Case) -> str:
  """Checks that a saved model loads again, and so does what is saved of that."""
  model = load(case.folder, dtype='auto')
  expected, code = run(model, case.tokens), {x.name for x in case.folder.glob('*.py')}
  with tempfile.TemporaryDirectory() as parent:
    for name in COPIES:
      copy = pathlib.Path(parent, name)
      model.save_pretrained(copy)
      assert {x.name for x in copy.glob('*.py')} == code
      model = load(copy, dtype='auto')
      assert torch.equal(run(model, case.tokens), expected)
  return 'same bits'


def check_gradients(case: Case) -> str:
  gradients = []
  for checkpointing in (False, True):
    model = load(case.folder).train()
    if checkpointing:
      model.gradient_checkpointing_enable()
    loss = training_loss(model, case.tokens)
    loss.backward()
    named = {name: x.grad for name, x in model.named_parameters()}
    for name, gradient in named.items():
      assert gradient is not None, name
      assert gradient.isfinite().all(), name
      assert 'shortcut' not in name or gradient.any(), name
    gradients.append(named)
  for name, gradient in gradients[0].items():
    torch.testing.assert_close(gradients[1][name], gradient)
  with torch.no_grad():
    norm = sum(x.grad.square().sum() for x in model.parameters()).sqrt()
    for x in model.parameters():
      x -= 0.01 / norm * x.grad
  after = training_loss(model, case.tokens)
  assert after < loss, f'a step against the gradient: {loss} to {after}'
  return 'descend'


CHECKS: dict[str, Callable[[Case], str]] = {
  'logits': check_logits,
  'base model': check_base_model,
  'generation': check_generation,
  'dtypes': check_dtypes,
  'devices': check_devices,
  'copies': check_copies,
  'gradients': check_gradients,
}


def cases() -> dict[str, Callable[[pathlib.Path], Case]]:
  """Returns functions that write each case into a folder, by its name."""
  found: dict[str, Callable[[pathlib.Path], Case]] = {}
  for name in FIXTURES:
    for preset in ('exact', 'free'):
      found[f'{name}, {preset}'] = lambda folder, name=name, preset=preset: fixture(
        name, preset, folder
      )
  for family in transformers_check.KNOWN:
    found[f'random {family}'] = lambda folder, family=family: random_case(
      family, folder
    )
  return found


def main() -> int:
  transformers.logging.disable_progress_bar()
  for name, make in cases().items():
    with tempfile.TemporaryDirectory() as parent:
      case = make(pathlib.Path(parent, 'model'))
      print(name)
      for check_name, check in CHECKS.items():
        print(f'  {check_name:12}{check(case)}', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
