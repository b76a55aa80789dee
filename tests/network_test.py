"""Nothing opens a socket: neither an import nor a function."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
CHECKPOINT = ROOT / 'tests' / 'testdata' / 'llama-tiny-sliced-head-0.25'

PROGRAM = """
import pathlib, pkgutil, sys

def hook(event, values):
  # An event loop makes a pair of sockets for itself; it does not reach outside.
  if event in ('socket.connect', 'socket.bind', 'socket.getaddrinfo', 'urllib.Request'):
    raise SystemExit(f'{event}: {values}')

sys.addaudithook(hook)
import rotbits_jax
for module in pkgutil.walk_packages(rotbits_jax.__path__, 'rotbits_jax.'):
  if '.cli.' not in module.name:  # several commands define flags of one name
    __import__(module.name)
folder, checkpoint = sys.argv[1:]
file = pathlib.Path(folder, 'x.rotbits')
rotbits_jax.encode_to_file(checkpoint, file, preset='exact', check=True)
rotbits_jax.decode_to_directory(file, pathlib.Path(folder, 'x'))
rotbits_jax.inspect(file)
model = rotbits_jax.load(file)
"""


def test_no_sockets(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, str(tmp_path), str(CHECKPOINT)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert (tmp_path / 'x' / 'model.safetensors').exists()
