"""A second forward pass in float64 NumPy, with Hugging Face's names and config files.

It follows the published definitions, one sequence and one head at a time. It shares no
code with the package.
"""

import numpy as np

NAMES = {
  'opt': {
    'prefix': 'model.decoder.',
    'norms': ('self_attn_layer_norm', 'final_layer_norm'),
    'final_norm': 'final_layer_norm',
    'out': 'out_proj',
    'mlp': ('fc1', 'fc2'),
  },
  'phi': {
    'prefix': 'model.',
    'norms': ('input_layernorm', None),
    'final_norm': 'final_layernorm',
    'out': 'dense',
    'mlp': ('mlp.fc1', 'mlp.fc2'),
  },
  'llama': {
    'prefix': 'model.',
    'norms': ('input_layernorm', 'post_attention_layernorm'),
    'final_norm': 'norm',
    'out': 'o_proj',
    'mlp': ('mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj'),
  },
}
NAMES['phi3'] = NAMES['llama'] | {'mlp': ('mlp.gate_up_proj', 'mlp.down_proj')}


def forward(tensors, config, tokens, slicing=None):
  """Computes the logits `[T, V]` of one sequence.

  Args:
    tensors: the checkpoint's tensors by name; linear weights are `[out, in]`.
    config: the checkpoint's config.json.
    tokens: `[T]`.
    slicing: the slicing JSON of a sliced checkpoint.

  Returns:
    float64 logits.
  """
  tensors = {name: np.asarray(t, np.float64) for name, t in tensors.items()}
  family, names = config['model_type'], NAMES[config['model_type']]
  heads = config['num_attention_heads']
  kv_heads = config.get('num_key_value_heads', heads)
  width = config.get('head_dim', config['hidden_size'] // heads)

  def linear(name, x):
    y = x @ tensors[name + '.weight'].T
    return y + tensors[name + '.bias'] if name + '.bias' in tensors else y

  def norm(name, x):
    if slicing is not None:  # RMSN: the mean is over the unsliced width
      mean = (x**2).sum(-1, keepdims=True) / slicing['hidden_size']
      return x / np.sqrt(mean + 1e-5)
    eps = config.get('rms_norm_eps', config.get('layer_norm_eps', 1e-5))
    if name + '.bias' in tensors:
      x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[name + '.weight']
    return y + tensors.get(name + '.bias', 0)

  def shortcut(name, x):
    return x if slicing is None else x @ tensors[name]

  def rotate(x):
    """Applies RoPE to `[T, h]` with complex numbers."""
    turned = int(width * config.get('partial_rotary_factor', 1.0))
    pairs = x[:, : turned // 2] + 1j * x[:, turned // 2 : turned]
    for t in range(len(x)):
      for i in range(turned // 2):
        pairs[t, i] *= np.exp(1j * t * config['rope_theta'] ** (-2 * i / turned))
    return np.concatenate([pairs.real, pairs.imag, x[:, turned:]], axis=1)

  def attention(name, x):
    if family == 'phi3':
      parts = linear(name + 'qkv_proj', x)
      split = [heads * width, (heads + kv_heads) * width]
      query, key, value = np.split(parts, split, axis=1)
    else:
      query, key, value = (linear(f'{name}{n}_proj', x) for n in 'qkv')
    mixed = []
    for head in range(heads):
      group = head // (heads // kv_heads)
      q = query[:, head * width : (head + 1) * width]
      k = key[:, group * width : (group + 1) * width]
      v = value[:, group * width : (group + 1) * width]
      if family != 'opt':
        q, k = rotate(q), rotate(k)
      out = np.zeros_like(q)
      for i in range(len(x)):
        start = max(0, i + 1 - (config.get('sliding_window') or len(x)))
        scores = k[start : i + 1] @ q[i] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[i] = weights / weights.sum() @ v[start : i + 1]
      mixed.append(out)
    return linear(name + names['out'], np.concatenate(mixed, axis=1))

  def mlp(name, x):
    *inner, down = (name + n for n in names['mlp'])
    if family == 'opt':
      hidden = np.maximum(linear(inner[0], x), 0)
    elif family == 'phi':
      u = linear(inner[0], x)
      hidden = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    else:
      both = np.concatenate([linear(n, x) for n in inner], axis=1)
      gate, up = np.split(both, 2, axis=1)
      hidden = gate / (1 + np.exp(-gate)) * up
    return linear(down, hidden)

  prefix = names['prefix']
  x = tensors[prefix + 'embed_tokens.weight'][tokens]
  if family == 'opt':
    x = x + tensors[prefix + 'embed_positions.weight'][2 : len(tokens) + 2]
  for layer in range(config['num_hidden_layers']):
    name = f'{prefix}layers.{layer}.'
    first, second = names['norms']
    normed = norm(f'{name}{first}', x)
    y = shortcut(name + 'attn_shortcut_Q', x) + attention(name + 'self_attn.', normed)
    if family == 'phi':
      x = y + mlp(name, normed)
    else:
      x = shortcut(name + 'mlp_shortcut_Q', y) + mlp(name, norm(f'{name}{second}', y))
  x = norm(prefix + names['final_norm'], x)
  if 'lm_head.weight' not in tensors:
    return x @ tensors[prefix + 'embed_tokens.weight'].T
  return linear('lm_head', x)


NAMES['mistral'] = NAMES['qwen2'] = NAMES['llama']


class ScaledBase:
  """A substitute for `rope_theta` in `forward`; its powers are Llama 3.1's frequencies.

  The published definition is by wavelength: short wavelengths stay, long wavelengths
  are multiplied by the factor, and the frequencies between are interpolated.
  """

  def __init__(self, theta, factor, low_freq_factor, high_freq_factor, positions):
    self.theta, self.factor, self.positions = theta, factor, positions
    self.low, self.high = low_freq_factor, high_freq_factor

  def __pow__(self, exponent):
    frequency = self.theta**exponent
    wavelength = 2 * np.pi / frequency
    if wavelength < self.positions / self.high:
      return frequency
    if wavelength > self.positions / self.low:
      return frequency / self.factor
    smooth = (self.positions / wavelength - self.low) / (self.high - self.low)
    return (1 - smooth) * frequency / self.factor + smooth * frequency


class DividedBase:
  """A substitute for `rope_theta` in `forward`; its powers are divided by a factor."""

  def __init__(self, theta, factor):
    self.theta, self.factor = theta, factor

  def __pow__(self, exponent):
    return self.theta**exponent / self.factor
