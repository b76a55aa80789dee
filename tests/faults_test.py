"""A fault at any operation on files leaves the older output or the new one."""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from fuzz import faults


class FaultsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    place = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.inputs = faults.Inputs.make(place)

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  @parameterized.parameters(*faults.SCENARIOS)
  def test_a_part_of_all_operations(self, name):
    scenario = faults.SCENARIOS[name]
    known = faults.expected(scenario, self.inputs, self.folder)
    self.assertGreater(known.operations, 4)
    for fault in ('disk full', 'interrupted'):
      for at in {1, known.operations // 2, known.operations}:
        with self.subTest(fault=fault, at=at):
          wrong = faults.problem(scenario, self.inputs, self.folder, known, fault, at)
          self.assertIsNone(wrong)

  @parameterized.parameters(
    ('encode over a file', lambda operations: operations // 2),
    ('encode over shards', lambda operations: operations - 10),
  )
  def test_a_run_that_is_killed(self, name, at):
    scenario = faults.SCENARIOS[name]
    known = faults.expected(scenario, self.inputs, self.folder)
    wrong = faults.problem(
      scenario, self.inputs, self.folder, known, 'killed', at(known.operations)
    )
    self.assertIsNone(wrong)

  def test_shards_must_be_readable_at_any_time(self):
    scenario = faults.SCENARIOS['encode over shards']
    known = faults.expected(scenario, self.inputs, self.folder)
    min(self.folder.glob('out-*')).unlink()
    wrong = faults.left(scenario, self.inputs, self.folder, known, may_leave=True)
    self.assertIn('neither', wrong)

  def test_what_is_left_behind_is_found(self):
    scenario = faults.SCENARIOS['encode, new file']
    known = faults.expected(scenario, self.inputs, self.folder)
    (self.folder / 'out').write_bytes(b'half a file')
    arguments = scenario, self.inputs, self.folder, known
    self.assertIn('neither', faults.left(*arguments, may_leave=True))
    (self.folder / 'out').unlink()
    (self.folder / '.out.partial').mkdir()
    self.assertIn('left behind', faults.left(*arguments, may_leave=False))

  def test_a_mixture_of_two_outputs_is_found(self):
    scenario = faults.SCENARIOS['decode over a directory']
    known = faults.expected(scenario, self.inputs, self.folder)
    shard = min((self.folder / 'out').glob('*.safetensors'))
    new = shard.read_bytes()
    faults.prepare(known.files, self.folder)
    arguments = scenario, self.inputs, self.folder, known
    shard.write_bytes(new)  # which reads well beside the older shards
    self.assertIn('neither', faults.left(*arguments, may_leave=False))
    shard.write_bytes(new[:-1])
    self.assertIsNone(faults.left(*arguments, may_leave=False))


@pytest.mark.slow
def test_all_operations():
  failures = []
  counts = faults.sweep(1, failures.append)
  assert not failures
  assert {name for name, _ in counts} == set(faults.SCENARIOS)


if __name__ == '__main__':
  absltest.main()
