"""Runs that were interrupted and are started again: what they keep, and what not."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest
import weights_files

from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.file import writer

ROOT = pathlib.Path(__file__).parents[1]
SLICED = seeds.LLAMA | {'num_hidden_layers': 3}
MODEL_RECORDS = ('layers.0', 'layers.1', 'layers.2', 'embed', 'head')
TENSORS = ('h.0', 'h.1', 'h.2', 'h.3', 'head')
RECORDS = 5
THEN = 1_700_000_000_000_000_000  # a time, in nanoseconds


def write_model(folder, seed=0):
  """Writes a checkpoint of a known family."""
  model = seeds.sliced_model(SLICED, seed=seed)
  files = {
    'config.json': json.dumps(SLICED).encode(),
    'tiny.json': json.dumps(checkpoints.slicing_json(model.config)).encode(),
  }
  checkpoints.save_checkpoint(checkpoints.Checkpoint(model, files, 'tiny'), folder)


def write_tensors(folder, seed=0):
  """Writes a checkpoint of an unknown family."""
  rng = np.random.default_rng(seed)
  folder.mkdir(exist_ok=True)
  names = [*(f'h.{i}.weight' for i in range(4)), 'head']
  tensors = {name: rng.normal(size=(8, 12)).astype(np.float16) for name in names}
  weights_files.write_safetensors(folder / 'model.safetensors', tensors)


def streams(path):
  """Returns the stream and the entry of each record of a file."""
  with file.Reader(path) as reader:
    return {
      name: (reader._decoder.files[name].read(name), entry)
      for name, entry in reader.records.items()
    }


@functools.cache
def encoded_at_once(files, preset, shard_size):
  """Returns the streams of a checkpoint that a run without interruption encodes."""
  with tempfile.TemporaryDirectory() as folder:
    source, output = pathlib.Path(folder, 'in'), pathlib.Path(folder, 'out.rotbits')
    source.mkdir()
    for name, data in files:
      (source / name).write_bytes(data)
    rotbits_jax.encode_to_file(source, output, preset=preset, shard_size=shard_size)
    return streams(output)


BOTH = parameterized.parameters(('free', write_model), ('exact', write_tensors))


class ResumeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.source, self.output = self.folder / 'in', self.folder / 'out.rotbits'

  def put(self, write, seed=0):
    """Writes the input, with the same times for all seeds."""
    write(self.source, seed)
    for path in self.source.iterdir():
      os.utime(path, ns=(THEN, THEN))

  def interrupted(self, count, preset='free', **options):
    """Starts to encode, and is interrupted after some records."""
    is_model = (self.source / 'config.json').exists()
    real, last = writer.encode_record, (MODEL_RECORDS if is_model else TENSORS)[count]

    # Threads take records in any order; so the name says which one is not coded.
    def encode_record(record, *args):
      if record.name == last:
        raise KeyboardInterrupt
      return real(record, *args)

    stopped = absltest.mock.patch.object(writer, 'encode_record', encode_record)
    with stopped, self.assertRaises(KeyboardInterrupt):
      rotbits_jax.encode_to_file(self.source, self.output, preset=preset, **options)

  def resumed(self, preset='free', **options):
    """Encodes, and returns how many records this run coded."""
    spy = absltest.mock.Mock(wraps=writer.encode_record)
    with absltest.mock.patch.object(writer, 'encode_record', spy):
      rotbits_jax.encode_to_file(self.source, self.output, preset=preset, **options)
    self.assertFalse((self.folder / '.out.rotbits.partial').exists())
    return spy.call_count

  def part(self, pattern):
    """Returns the path of a file that the interrupted run left."""
    (path,) = self.folder.glob(f'.out.rotbits.partial/process-0/{pattern}')
    return path

  def assert_is_like_encoded_at_once(self, preset='free', shard_size=None):
    given = tuple((x.name, x.read_bytes()) for x in sorted(self.source.iterdir()))
    expected = encoded_at_once(given, preset, shard_size)
    self.assertEqual(streams(self.output), expected)

  @parameterized.parameters(
    ('free', write_model, None), ('free', write_model, 1000),
    ('exact', write_tensors, None), ('exact', write_tensors, 200),
  )  # fmt: skip
  def test_the_bytes_are_those_of_a_run_in_one_go(self, preset, write, shard_size):
    self.put(write)
    self.interrupted(2, preset, shard_size=shard_size)
    names = sorted(path.name for path in self.folder.iterdir())
    self.assertEqual(names, ['.out.rotbits.partial', 'in'])
    self.assertEqual(self.resumed(preset, shard_size=shard_size), RECORDS - 2)
    self.assert_is_like_encoded_at_once(preset, shard_size=shard_size)

  @BOTH
  def test_other_elements_of_the_same_names_sizes_and_times(self, preset, write):
    self.put(write)
    before = checkpoints.open_any(self.source).fingerprint()
    self.interrupted(2, preset)
    self.put(write, seed=1)
    self.assertEqual(checkpoints.open_any(self.source).fingerprint(), before)
    self.assertEqual(self.resumed(preset), RECORDS)
    self.assert_is_like_encoded_at_once(preset)

  def test_records_before_the_first_that_changed_are_kept(self):
    self.put(write_tensors)
    self.interrupted(4, 'exact')
    path = self.source / 'model.safetensors'
    tensor = checkpoints.open_tensors(self.source).read('h.2')['h.2.weight']
    other = tensor[:, ::-1].tobytes()
    path.write_bytes(path.read_bytes().replace(tensor.tobytes(), other))
    os.utime(path, ns=(THEN, THEN))
    self.assertEqual(self.resumed('exact'), RECORDS - 2)
    self.assert_is_like_encoded_at_once('exact')

  @BOTH
  def test_a_source_that_changes_during_the_run(self, preset, write):
    self.put(write)
    real, output = writer.FileWriter.add, self.output

    def add(own, entry, data):
      self.put(write, seed=len(entry.name))
      return real(own, entry, data)

    changing = absltest.mock.patch.object(writer.FileWriter, 'add', add)
    with changing, self.assertRaisesRegex(checkpoints.CheckpointError, 'it changed'):
      # Names, sizes and times stay. The check reads everything again.
      rotbits_jax.encode_to_file(self.source, output, preset='exact', check=True)
    self.assertFalse(output.exists())

  @BOTH
  def test_another_version_begins_anew(self, preset, write):
    self.put(write)
    self.interrupted(3, preset)
    with absltest.mock.patch.object(rotbits_jax, '__version__', '0.0'):
      self.assertEqual(self.resumed(preset), RECORDS)

  def test_other_settings_begin_anew(self):
    self.put(write_model)
    self.interrupted(3)
    self.assertEqual(self.resumed(tolerance=0.5), RECORDS)

  def test_a_damaged_record_is_coded_again(self):
    self.put(write_model)
    self.interrupted(3)
    path = self.part('out.rotbits')
    path.write_bytes(path.read_bytes()[:-10] + bytes(10))  # of the third record
    # The state is lost, so the gauge is computed from the source again.
    self.assertEqual(self.resumed(), RECORDS - 2)
    self.assert_is_like_encoded_at_once()

  def test_a_journal_that_ends_in_a_line_cut_short(self):
    self.put(write_model)
    self.interrupted(3)
    journal = self.part('journal.jsonl')
    journal.write_text(journal.read_text()[:-10])
    self.assertEqual(self.resumed(), RECORDS - 2)
    self.assert_is_like_encoded_at_once()

  def test_some_of_the_records_of_one_step_are_noted(self):
    self.put(write_model)
    self.interrupted(RECORDS - 1)
    # All records outside the layers are noted together. A crash may cut the lines.
    lines = self.part('journal.jsonl').read_text().splitlines(keepends=True)
    self.assertLen(lines, 4)
    finish = absltest.mock.patch.object(
      writer.FileWriter, 'finish', side_effect=KeyboardInterrupt
    )
    with finish, self.assertRaises(KeyboardInterrupt):
      rotbits_jax.encode_to_file(self.source, self.output, preset='free')
    journal = self.part('journal.jsonl')
    lines = journal.read_text().splitlines(keepends=True)
    self.assertLen(lines, 1 + RECORDS)
    journal.write_text(''.join(lines[:-1]))
    self.assertEqual(self.resumed(), 1)
    self.assert_is_like_encoded_at_once()

  @parameterized.parameters('cut', 'shapes', 'count', 'dtypes')
  def test_a_state_that_does_not_fit_is_computed_again(self, damage):
    self.put(write_model)
    self.interrupted(3)
    path = self.part('state-*.npz')
    with np.load(path) as arrays:
      leaves = [arrays[name] for name in arrays.files]
    self.assertNotEmpty(leaves)
    changed = {
      'shapes': [x[None] for x in leaves],
      'count': [*leaves, *leaves],
      'dtypes': [x.astype(np.float64) for x in leaves],
    }
    if damage == 'cut':
      path.write_bytes(path.read_bytes()[:-100])
    else:
      np.savez(path, *changed[damage])
    self.assertEqual(self.resumed(), RECORDS - 3)
    self.assert_is_like_encoded_at_once()

  def test_two_runs_do_not_write_one_output(self):
    self.put(write_tensors)
    real = writer.encode_record

    def encode_record(*args):
      with self.assertRaisesRegex(BlockingIOError, 'another process writes here'):
        rotbits_jax.encode_to_file(self.source, self.output)
      return real(*args)

    with absltest.mock.patch.object(writer, 'encode_record', encode_record):
      rotbits_jax.encode_to_file(self.source, self.output)
    self.assertTrue(rotbits_jax.verify(self.output, against=self.source).same_bits)

  def test_errors_leave_nothing(self):
    self.put(write_tensors)
    failing = absltest.mock.patch.object(
      writer, 'encode_record', side_effect=ValueError('x')
    )
    with failing, self.assertRaisesRegex(ValueError, 'x'):
      rotbits_jax.encode_to_file(self.source, self.output)
    self.assertEqual([x.name for x in self.folder.iterdir()], ['in'])

  def test_a_disk_that_is_full_from_the_start_leaves_nothing(self):
    self.put(write_tensors)
    full = absltest.mock.patch.object(
      pathlib.Path, 'write_text', side_effect=OSError(28, 'No space left on device')
    )
    with full, self.assertRaisesRegex(OSError, 'No space'):
      rotbits_jax.encode_to_file(self.source, self.output)
    self.assertEqual([x.name for x in self.folder.iterdir()], ['in'])

  @pytest.mark.slow
  def test_kill(self):
    self.put(write_model)
    program = f"""
      import rotbits_jax
      from rotbits_jax.file import writer
      import os, signal, time
      real, count = writer.encode_record, [0]
      def encode_record(*args):
        count[0] += 1
        if count[0] > 2:
          time.sleep(2)  # meanwhile others are written
          os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
      writer.encode_record = encode_record
      rotbits_jax.encode_to_file({str(self.source)!r}, {str(self.output)!r})
    """
    done = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(program)], cwd=ROOT, check=False
    )
    self.assertEqual(done.returncode, -signal.SIGKILL)
    self.assertBetween(self.resumed(), RECORDS - 2, RECORDS - 1)
    self.assert_is_like_encoded_at_once()


if __name__ == '__main__':
  absltest.main()
