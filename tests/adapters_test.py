"""LoRA adapters: `free` carries them into the coordinates that it chooses."""

import json
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import chex
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import tensors as tensors_lib
from tests import random_models
from tests import transform_checks

LLAMA = random_models.BASE | {'num_hidden_layers': 2}
MIXTRAL = LLAMA | {
  'model_type': 'mixtral',
  'rms_norm_eps': 1e-5,
  'sliding_window': None,
  'num_local_experts': 3,
  'num_experts_per_tok': 2,
}
PHI3 = LLAMA | {'model_type': 'phi3', 'rms_norm_eps': 1e-5}
OPT = {
  'model_type': 'opt',
  'hidden_size': 24,
  'ffn_dim': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'vocab_size': 40,
  'max_position_embeddings': 30,
  'word_embed_proj_dim': 24,
}
MODELS = {
  'dense': lambda: random_models.random_model(LLAMA),
  'sliced': lambda: random_models.sliced(LLAMA, (18, 18, 20, 20, 24)),
  'mixture': lambda: random_models.random_model(MIXTRAL),
  'fused rows': lambda: random_models.random_model(PHI3),
  'opt': lambda: random_models.random_model(OPT),
  'opt sliced': lambda: random_models.sliced(OPT, (18, 18, 18, 18, 24)),
}
CONFIG = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 3, 'use_dora': False}
WEIGHTS = 'adapter_model.safetensors'
TOKENS = np.arange(9)[None]


def write_adapter(folder, model, skipped=()):
  """Writes a random adapter of all weights of a model, and returns it."""
  rng, tensors = np.random.default_rng(0), {}
  for entry in (x for own in tensors_lib.entries(model.config).values() for x in own):
    (path, *_) = entry.paths
    if models.layout.adapter_of(path) == path or '_shortcut' in path:
      continue
    if any(name in path for name in skipped):
      continue
    outputs, inputs = entry.shape if entry.transposed else entry.shape[::-1]
    module = f'base_model.model.{entry.name.removesuffix(".weight")}'
    for side, shape in (('A', (2, inputs)), ('B', (outputs, 2))):
      kind = f'{side}.weight' if entry.transposed else f'embedding_{side}'
      factor = rng.standard_normal(shape) / 3
      tensors[f'{module}.lora_{kind}'] = factor.astype(np.float32)
  return write(folder, tensors, CONFIG)


def write(folder, tensors, config):
  folder.mkdir(parents=True, exist_ok=True)
  content = safetensors_files.to_bytes(tensors)
  (folder / 'adapter_model.safetensors').write_bytes(content)
  (folder / 'adapter_config.json').write_text(json.dumps(config))
  return folder


def read(path):
  return {name: x.read() for name, x in safetensors_files.open_file(path).items()}


def merged_logits(model, folder):
  """Returns the logits of a model with an adapter added to its weights."""
  adapter = checkpoints.read_adapter(folder, model)
  flat = dict(model.materialize().leaves())
  for path in list(flat):
    pair = adapter.factors.get(models.layout.adapter_of(path))
    if pair is not None:
      flat[path] = flat[path] + np.float32(pair.u) @ np.float32(pair.v)
  tree = structured.unflatten(flat)
  read, count = (lambda name: {name: tree.pop(name)}), model.config.num_layers
  layers = [models.read_layer(read, model.config, i) for i in range(count)]
  return transform_checks.fast_logits(
    models.from_layers(model.config, tree, layers), TOKENS
  )


class AdaptersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch)

  @parameterized.parameters(*MODELS)
  def test_the_function_with_the_adapter_is_kept(self, name):
    model = MODELS[name]()
    skipped = {'opt': ('attention/out',), 'mix': ('mlp/up', 'mlp/gate', 'mlp/down')}
    skipped = skipped.get(name[:3], ())
    given = write_adapter(self.folder / 'lora', model, skipped)
    data = rotbits_jax.encode(model, preset='free', adapters=[given])
    with file.Reader(data) as reader:
      for path, content in reader.files().items():
        (self.folder / 'out' / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / 'out' / path).write_bytes(content)
    carried = self.folder / 'out' / 'lora'
    decoded = rotbits_jax.decode(data)
    expected = merged_logits(model, given)
    plain = transform_checks.fast_logits(model, TOKENS)
    self.assertGreater(np.abs(expected - plain).max(), 0.1)
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(
      merged_logits(decoded, carried), expected, atol=tolerance
    )
    config = json.loads((carried / 'adapter_config.json').read_text())
    self.assertEqual(
      config, CONFIG | dict.fromkeys(('base_model_name_or_path', 'revision'))
    )

  def test_factors_of_two_dtypes_keep_their_numbers(self):
    model = MODELS['dense']()
    given = write_adapter(self.folder / 'lora', model)
    tensors = read(given / WEIGHTS)
    for name, x in tensors.items():
      tensors[name] = x.astype(np.float16) if 'lora_A' in name else x * np.float32(1e-9)
    write(given, tensors, CONFIG)
    adapter = checkpoints.read_adapter(given, model)
    (given / WEIGHTS).write_bytes(adapter.files(adapter.factors)[WEIGHTS])
    for name, x in read(given / WEIGHTS).items():
      np.testing.assert_array_equal(x, tensors[name])

  def test_large_numbers_are_carried_or_refused(self):
    model, query = MODELS['dense'](), 'layers.0/attention/query/adapter'
    model.params['layers.0:2']['mlp_norm']['scale'][:] = 1
    given = write_adapter(self.folder / 'lora', model)
    tensors = {name: x.astype(np.float16) for name, x in read(given / WEIGHTS).items()}
    (name,) = (x for x in tensors if 'layers.1.mlp.up_proj.lora_A' in x)
    context, transform = passes.make_context(model), presets.free().transform
    tensors[name][0, :2] = 6e4
    write(given, tensors, CONFIG)
    factors = checkpoints.read_adapter(given, model).factors
    carried = passes.carry(context, transform, factors)
    self.assertFalse(np.allclose(carried[query].u, factors[query].u))
    tensors[name][0] = 6e4
    write(given, tensors, CONFIG)
    factors = checkpoints.read_adapter(given, model).factors
    with self.assertRaisesRegex(ValueError, 'would be too large'):
      passes.carry(context, transform, factors)

  def test_a_head_that_is_almost_singular_is_refused(self):
    model = MODELS['dense']()
    out, h = (
      model.params['layers.0:2']['attention']['out']['kernel'],
      model.config.head_dim,
    )
    for last in range(h - 1, len(out[0]), h):  # the sum of the others
      out[:, last] = out[:, last - h + 1 : last].sum(axis=1)
    given = write_adapter(self.folder / 'lora', model)
    with self.assertRaisesRegex(
      ValueError, 'attention/out/adapter: .* accurate enough'
    ):
      rotbits_jax.encode(model, preset='free', adapters=[given])
    other = write_adapter(self.folder / 'other', model, ('attention/out',))
    rotbits_jax.encode(model, preset='free', adapters=[other])

  def test_a_transform_that_carries_none_is_named(self):
    model = MODELS['dense']()
    given = write_adapter(self.folder / 'lora', model)
    preset = presets.free(transforms=(passes.Transform('neuron scales'),))
    with self.assertRaisesRegex(ValueError, "'neuron scales' carries none"):
      rotbits_jax.encode(model, preset=preset, adapters=[given])

  def test_others_are_refused_by_name(self):
    model = MODELS['dense']()
    given = write_adapter(self.folder / 'lora', model)
    tensors = {
      x: y.read() for x, y in safetensors_files.open_file(given / WEIGHTS).items()
    }
    prefix = 'base_model.model'
    query = f'{prefix}.model.layers.0.self_attn.q_proj.lora'
    wide = np.ones((3, 24), np.float32)
    for config, changed, message in (
      ({'use_dora': True}, {}, 'use_dora is True'),
      ({'bias': 'all'}, {}, "bias is 'all'"),
      ({'modules_to_save': ['lm_head']}, {}, 'modules_to_save is'),
      ({'init_lora_weights': 'pissa'}, {}, "init_lora_weights is 'pissa'"),
      ({'peft_type': 'IA3'}, {}, "peft_type is 'IA3'"),
      ({}, {f'{query}_magnitude_vector': wide}, 'magnitude_vector is no factor'),
      ({}, {f'{query}_A.weight': wide}, 'q_proj.lora_B.weight is missing, or is not'),
      ({}, {f'{query}_A.weight': wide[0, 0]}, 'q_proj.lora_A.weight is missing, or is'),
      ({}, {f'{query}_A.weight': np.ones((2, 24), int)}, 'has the dtype int64'),
      ({}, {f'{prefix}.model.norm.lora_A.weight': wide}, 'norm.* is no factor'),
      (
        {},
        {f'{prefix}.lm_head.base_layer.weight': wide},
        'is not the weight of',
      ),
    ):
      folder = write(self.folder / 'other', tensors | changed, CONFIG | config)
      with self.assertRaisesRegex(checkpoints.CheckpointError, message):
        rotbits_jax.encode(model, preset='free', adapters=[folder])
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'an adapter is a folder'):
      rotbits_jax.encode(model, preset='free', adapters=[self.folder])
    with self.assertRaisesRegex(ValueError, "'exact' carries no adapter"):
      rotbits_jax.encode(model, preset='exact', adapters=[given])
    with self.assertRaisesRegex(ValueError, 'beside a base'):
      rotbits_jax.encode(model, preset='free', adapters=[given], base=model)
    with self.assertRaisesRegex(ValueError, "folders of the name 'lora'"):
      rotbits_jax.encode(model, preset='free', adapters=[given, given])

  def test_folders_that_the_checkpoint_has(self):
    model = MODELS['dense']()
    config = json.dumps(CONFIG).encode()
    files = {'notes.txt': b'', 'a/adapter_config.json': config}
    files['b/adapter_config.json'] = config.replace(b'3', b'4')
    for name in ('notes.txt', 'b', 'model.safetensors', 'config.json'):
      given = write_adapter(self.folder / name, model)
      with self.assertRaisesRegex(checkpoints.CheckpointError, f'^{name}: the folder'):
        rotbits_jax.encode(model, preset='free', adapters=[given], files=files)
    given = write_adapter(self.folder / 'a', model)  # the same adapter
    rotbits_jax.encode(model, preset='free', adapters=[given], files=files)

  def test_experts_have_no_adapters(self):
    model = MODELS['mixture']()
    given = write_adapter(self.folder / 'lora', model)  # also of '*', every expert
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'experts.* is no factor'):
      rotbits_jax.encode(model, preset='free', adapters=[given])

  def test_an_output_projection_beside_biases_is_refused(self):
    model = MODELS['opt']()
    given = write_adapter(self.folder / 'lora', model)
    with self.assertRaisesRegex(ValueError, 'attention/out, which also multiplies'):
      rotbits_jax.encode(model, preset='free', adapters=[given])

  def test_a_copy_of_the_embedding_is_dropped(self):
    model = MODELS['dense']()
    given = write_adapter(self.folder / 'lora', model)
    tensors = {
      x: y.read() for x, y in safetensors_files.open_file(given / WEIGHTS).items()
    }
    copy = {
      'base_model.model.model.embed_tokens.base_layer.weight': model.params['embed'][
        'tokens'
      ]
    }
    write(given, tensors | copy, CONFIG)
    adapter = checkpoints.read_adapter(given, model)
    files = adapter.files(adapter.factors)
    (self.folder / 'again').write_bytes(files[WEIGHTS])
    chex.assert_trees_all_equal(read(self.folder / 'again'), tensors)


if __name__ == '__main__':
  absltest.main()
