"""The config files of the folder `configs` at the top level of the repository.

A clone has the folder beside the package. setup.py maps it into an installed package.
"""

import os
import pathlib
import re
import runpy
from typing import Any


def paths() -> dict[str, pathlib.Path]:
  """Returns the paths of the config files by their names, which have no suffix."""
  package = pathlib.Path(__file__).parents[1]
  installed = package / 'configs'
  folder = installed if installed.is_dir() else package.with_name('configs')
  files = sorted(folder.glob('[!_]*.py'))
  return {path.stem: path for path in files}


def load(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of a config file, with the defaults of its arguments."""
  return runpy.run_path(str(path))['get_config']().to_dict()


def named(flag: str, argument: str) -> str:
  """Puts the path of a config file in place of its name.

  Args:
    flag: name of a flag that takes config files.
    argument: an argument of the command line, such as '--config=opt_6_7b:0.25'.

  Returns:
    The argument with the path, if it gives the flag the name of a config file; else
    the argument itself.

  Raises:
    ValueError: if it gives the flag another name, and no path.
  """
  start, _, value = argument.partition('=')
  name, colon, rest = value.partition(':')
  if start.lstrip('-') != flag:
    return argument
  known = paths()
  if name in known:
    return f'{start}={known[name]}{colon}{rest}'
  if re.fullmatch(r'\w+', value) and not os.path.exists(value):
    raise ValueError(f'--{flag}: {value!r} is no file and none of {", ".join(known)}')
  return argument
