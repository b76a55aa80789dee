"""Builds the documentation: sphinx-build -W -b html docs build/docs."""

import os
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap

from sphinx.search.en import SearchEnglish

import rotbits_jax
from rotbits_jax import structured
from rotbits_jax.cli import main

HERE = pathlib.Path(__file__).parent

project = 'rotbits_jax'
author = 'the rotbits_jax authors'
copyright = 'the rotbits_jax authors, Apache-2.0'

version = release = rotbits_jax.__version__

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]
if 'CI' in os.environ:  # the inventories of others need a network
  extensions.append('sphinx.ext.intersphinx')
  intersphinx_mapping = {
    'jax': ('https://docs.jax.dev/en/latest/', None),
    'numpy': ('https://numpy.org/doc/stable/', None),
    'python': ('https://docs.python.org/3/', None),
  }
exclude_patterns = ['build']
highlight_language = 'text'  # blocks that name none are tables and outputs
smartquotes_action = 'qe'  # quotes and ellipses: --flag keeps its dashes
# A preset is called `near`, which is no word of a search in English.
SearchEnglish.stopwords = SearchEnglish.stopwords - {'near'}
html_theme = 'sphinx_book_theme'
html_title = f'rotbits_jax {version}'
html_favicon = 'static/favicon.svg'
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_theme_options = {
  'show_toc_level': 2,
  'home_page_in_toc': True,
  'navbar_persistent': [],  # the sidebar has the search
}

if 'GITHUB_REPOSITORY' in os.environ:
  html_theme_options |= {
    'repository_url': f'https://github.com/{os.environ["GITHUB_REPOSITORY"]}',
    'use_repository_button': True,
    'path_to_docs': 'docs',
    'launch_buttons': {'colab_url': 'https://colab.research.google.com'},
  }

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
# The pages that stand in the repository have links to files beside them.
suppress_warnings = [
  'myst.xref_missing',
  'ref.python',
]  # types in signatures have short names
# Pages with code run when the site is built, and an error in them is the build's.
nb_execution_mode = 'force'
nb_execution_raise_on_error = True
# These have stored outputs, see scripts/notebooks.py, and stand in colabs/.
nb_execution_excludepatterns = ['notebooks/*.ipynb']
nb_execution_timeout = 600
nb_merge_streams = True

shutil.copytree(HERE.parent / 'colabs', HERE / 'notebooks', dirs_exist_ok=True)

autodoc_default_options = {'member-order': 'bysource'}
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
napoleon_use_rtype = False
# NamedTuples and dataclasses describe their fields in the class.
napoleon_use_ivar = True

_MODULE = """## {name}

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :ignore-module-all:
   :show-inheritance:
   :exclude-members: name, parent, scope
```
"""


def _write_reference():
  """Writes a page for each package, with its modules, from their docstrings."""
  folder = HERE / 'reference'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  pages = {}
  for module in pkgutil.walk_packages(rotbits_jax.__path__, 'rotbits_jax.'):
    package, *rest = module.name.removeprefix('rotbits_jax.').split('.')
    hidden = package in ('cli', 'testdata', 'configs') or 'remote_code' in rest
    if not hidden and not rest and not module.ispkg:
      package = 'rotbits_jax'
    if not hidden and '__main__' not in module.name:
      pages.setdefault(package, []).append(module.name)
  for package, modules in pages.items():
    sections = '\n'.join(_MODULE.format(name=name) for name in modules)
    (folder / f'{package}.md').write_text(f'# {package}\n\n{sections}', 'utf-8')
  names = '\n'.join(sorted(pages))
  index = f'# Python API\n\n```{{toctree}}\n:maxdepth: 2\n\n{names}\n```\n'
  (folder / 'index.md').write_text(index, 'utf-8')


_write_reference()

_COMMAND = """# rotbits {name}

`rotbits {name}` {purpose}.

```text
{usage}
```

{text}

## Flags

```text
{flags}
```
"""


def _write_commands():
  """Writes a page for each command, from what it prints for --help."""
  folder = HERE / 'commands'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  for name, purpose in main.COMMANDS.items():
    command = [sys.executable, '-m', 'rotbits_jax', name, '--help']
    printed = subprocess.run(command, capture_output=True, check=True, text=True)
    text, usage, flags = printed.stdout.rstrip().rsplit('\n\n', 2)
    page = _COMMAND.format(
      name=name,
      purpose=purpose,
      usage=usage,
      text=_as_markdown(text),
      flags=textwrap.dedent(flags),
    )
    (folder / f'{name}.md').write_text(page, 'utf-8')


def _as_markdown(text):
  """Makes Markdown of a help text: examples are code, and JSON has a heading."""
  paragraphs = []
  for paragraph in text.split('\n\n')[1:]:  # the first one is the purpose
    if paragraph.startswith('  '):
      paragraphs.append(f'```text\n{textwrap.dedent(paragraph)}\n```')
    else:
      paragraph = re.sub(r'(?<![`\w])(--\w+(=[\w.]+)?)', r'`\1`', paragraph)
      words = re.split(r'(`[^`]*`)', paragraph)
      words[::2] = [re.sub(r'([<>*_])', r'\\\1', word) for word in words[::2]]
      text = ''.join(words)
      json = '## JSON\n\n`--json` prints one object: '
      paragraphs.append(re.sub(r'^JSON: ', json, text))
  return '\n\n'.join(paragraphs)


_write_commands()

_SECTION = re.compile(r'(Args|Attributes|Raises|Returns|Yields|References?|Example):$')
_BULLET = re.compile(r'\s*([*-]|\d+\.) ')


def _as_text(app, what, name, obj, options, lines):
  """Makes reStructuredText of a docstring, whose mathematics is plain text.

  Outside the sections, a paragraph that is indented or has columns is shown as it is.
  Elsewhere stars, bars and underscores are letters, and a name in backticks is code.
  """
  del app, what, name, obj, options
  found, section = [], ''
  for paragraph in '\n'.join(lines).split('\n\n'):
    own = paragraph.split('\n')
    own = own[own[0] == '' :]
    if own and own[0][:1].strip():
      match = _SECTION.match(own[0])
      section = match[1] if match else ''
    if own and not section and _is_drawn(own):
      found += ['::', '', *(f'  {line}' for line in own), '']
      continue
    if section in ('Returns', 'Yields'):
      own = _as_list(own)
    found += [*map(_escaped, own), '']
  lines[:] = found


def _is_drawn(paragraph):
  """Whether a paragraph is a formula, a program or a table."""
  if _BULLET.match(paragraph[0]):
    return False
  indented = any(line.startswith('  ') for line in paragraph)
  return indented or any(re.search(r'\S {3,}\S', line) for line in paragraph)


def _as_list(paragraph):
  """Several named values that a function returns, as a list."""
  name = re.compile(r'  (\w+): ')
  if sum(name.match(line) is not None for line in paragraph) < 2:
    return paragraph
  return [
    name.sub(r'  * `\1` is ', line) if name.match(line) else line for line in paragraph
  ]


def _escaped(line):
  bullet = _BULLET.match(line)
  start = bullet.end() if bullet else 0
  parts = re.split(r'`+([^`]+)`+', line[start:])
  parts[::2] = [re.sub(r'([*|]|_\b)', r'\\\1', part) for part in parts[::2]]
  parts[1::2] = [f'``{part}``' for part in parts[1::2]]
  return line[:start] + ''.join(parts)


_MODULES = re.compile(r'~?\b(jax|flax|numpy|rotbits_jax)\.(_src\.)?(\w+\.)*(?=[A-Z])')
_LIMITS = re.compile(
  r"""~?(?:typing\.)?Annotated\[((?:[^\[\]]|\[[^\[\]]*\])+?),
  \s msgspec\.Meta\((?:[^()']|'[^']*')*\)\]""",
  re.VERBOSE,
)


def _public(text):
  """Names types as users import them, without the limits of what a file may hold."""
  while text and (found := _LIMITS.search(text)):
    text = f'{text[: found.start()]}{found[1]}{text[found.end() :]}'
  name = lambda found: '' if found[1] == 'rotbits_jax' else f'{found[1]}.'
  return text and _MODULES.sub(name, text)


def _public_types(app, what, name, obj, options, signature, returns):
  """No private module is in a signature."""
  del app, what, name, obj, options
  return _public(signature), _public(returns)


def _public_lines(app, what, name, obj, options, lines):
  """Does the same for the types of fields, which Napoleon writes."""
  del app, what, name, obj, options
  lines[:] = [re.sub(r'\bjax\._src\.(\w+\.)*', 'jax.', line) for line in lines]


def _skip(app, what, name, obj, skip, options):
  """Leaves out methods of all leaves, and fields that only the class describes."""
  del app, what, options
  if (getattr(obj, '__doc__', None) or '').startswith('Alias for field number'):
    return True
  obj = getattr(obj, 'fget', obj)
  home = getattr(obj, '__module__', None) or ''
  owner, _, method = getattr(obj, '__qualname__', '').partition('.')
  is_leaf = home.startswith('rotbits_jax.structured') and owner != 'Structured'
  return True if is_leaf and method and name in _OF_ALL_LEAVES else skip


_OF_ALL_LEAVES = {*vars(structured.Structured), 'replace'}


def setup(app):
  app.connect('autodoc-skip-member', _skip)
  app.connect('autodoc-process-docstring', _public_lines, priority=900)
  app.connect('autodoc-process-signature', _public_types)
  app.connect('autodoc-process-docstring', _as_text, priority=100)
