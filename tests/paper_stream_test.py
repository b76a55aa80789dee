"""The message of the preset `paper` is streamed, and malformed messages are refused."""

import copy
import dataclasses
import functools
import os
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax import paper
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import haar
from rotbits_jax.coding.bits_back import word_stack
from rotbits_jax.paper import segments
from tests import codec_checks
from tests import paper_test
from tests import random_models

WIDTHS = [14, 14, 14, 14, 14]


def _words(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 1 << 16, count).astype(np.uint16)


@functools.cache
def _encoded(entropy=False):
  """Returns a model, its encoding and its message."""
  model = random_models.sliced_llama(WIDTHS, np.float16)
  return model, *paper_test.encode(model, entropy=entropy)


class WordStackTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 7, 100)
  def test_spills_what_is_not_kept_in_order(self, keep):
    rng = np.random.default_rng(keep)
    spilled = []
    stack = word_stack.WordStack(spill=lambda x: spilled.append(np.array(x)))
    # This stack keeps all words in memory.
    whole = word_stack.WordStack()
    for seed in range(40):
      words = _words(int(rng.integers(0, 20)), seed)
      for each in (stack, whole):
        each.push(words)
      stack.settle(keep)
      self.assertLessEqual(stack.size, keep)
      count = int(rng.integers(0, stack.size + 1))
      np.testing.assert_array_equal(stack.pop(count), whole.pop(count))
    stack.settle(0)
    np.testing.assert_array_equal(np.concatenate(spilled), whole.pop(whole.size))

  def test_reads_a_memory_map_from_its_end(self):
    words = _words(50000)
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory) / 'words'
      path.write_bytes(b'head' + words.tobytes())
      mapped = np.memmap(path, np.uint16, 'r', offset=4)
      stack = word_stack.WordStack(mapped)
      stack.push(words[:10])
      np.testing.assert_array_equal(stack.pop(10), words[:10])
      for start, stop in ((40000, 50000), (39999, 40000), (1, 39999), (0, 1)):
        taken = stack.pop(stop - start)
        np.testing.assert_array_equal(taken, words[start:stop])
        self.assertNotIsInstance(taken, np.memmap)
      self.assertEqual(stack.size, 0)

  def test_positions_are_beyond_32_bits(self):
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory) / 'words'
      path.touch()
      os.truncate(path, (3 << 32) + 6)  # takes no space
      with path.open('r+b') as file:
        file.seek(-6, os.SEEK_END)
        file.write(_words(3).tobytes())
      stack = word_stack.WordStack(np.memmap(path, np.uint16, 'r'))
      self.assertEqual(stack.size, (3 << 31) + 3)
      np.testing.assert_array_equal(stack.pop(3), _words(3))
      np.testing.assert_array_equal(stack.pop(2), [0, 0])
      self.assertEqual(stack.size, (3 << 31) - 2)

  def test_blocks_are_popped_by_their_length(self):
    stack = word_stack.WordStack()
    blocks = [_words(count, count) for count in (3, 0, 70000)]
    for block in blocks:
      stack.push_block(block)
    for block in blocks[::-1]:
      np.testing.assert_array_equal(stack.pop_block(), block)
    for words in ([], [1], [4, 0], [0, 1]):
      short = word_stack.WordStack(np.array(words, np.uint16))
      with self.assertRaisesRegex(ValueError, 'ran dry'):
        short.pop_block()

  @parameterized.parameters(1, 8)
  def test_a_rotation_is_popped_from_words_and_pushed_back(self, lanes):
    words, codec = _words(400 * lanes), haar.codec(9, 9)
    stack = word_stack.WordStack(words)
    cells = []
    for _ in range(2):
      rows = stack.pop(60 * lanes).reshape(60, lanes)
      message, popped = jax.jit(codec.pop)(rans.stacked(jnp.asarray(rows), 60))
      cells.append(popped)
      stack.push_block(rans.to_words(rans.check(message)))
    self.assertLess(stack.size, (400 - 2) * lanes)
    for popped in cells[::-1]:
      message = rans.from_words(stack.pop_block(), lanes, 60)
      message = rans.check(jax.jit(codec.push)(message, popped))
      stack.push(rans.unstacked(message).reshape(-1))
    np.testing.assert_array_equal(stack.pop(stack.size), words)

  def test_a_message_of_other_words_is_refused(self):
    message = rans.stacked(jnp.asarray(_words(40).reshape(10, 4)), 20)
    for wrong in (
      message._replace(state=message.state + jnp.uint32(1 << 16)),
      message._replace(size=message.size.at[1].add(-1)),
    ):
      with self.assertRaisesRegex(rans.MessageError, 'words alone'):
        rans.unstacked(wrong)

  def test_uniform_words_are_pushed_as_rans_pushes_them(self):
    """A stack of words is a message whose last row is the low half of the states."""
    lanes, rows = 4, _words(20).reshape(5, 4)
    message = rans.stacked(jnp.asarray(rows[:2]), 8)
    for row in rows[2:]:
      start = jnp.asarray(row, jnp.uint32)
      message = rans.push(message, start, jnp.ones(lanes, jnp.uint32), 16)
    codec_checks.assert_same_message(message, rans.stacked(jnp.asarray(rows), 8))


class StreamTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_words_do_not_depend_on_how_many_are_kept(self, entropy):
    model, encoded, message = _encoded(entropy)
    settle, calls = word_stack.WordStack.settle, []

    def settle_late(stack, keep):
      calls.append(keep)
      settle(stack, 1 << 40 if keep else 0)

    with mock.patch.object(word_stack.WordStack, 'settle', settle_late):
      again, words = paper_test.encode(model, entropy=entropy)
    self.assertGreater(len(calls), 5)
    self.assertEqual(encoded.layout, again.layout)
    np.testing.assert_array_equal(message, words)

  def test_holds_a_part_of_the_message_only(self):
    model, _, message = _encoded()
    held, spilled = [], []
    push = word_stack.WordStack.push

    def watched(stack, words):
      push(stack, words)
      held.append(stack.size)

    with mock.patch.object(word_stack.WordStack, 'push', watched):
      options = paper_test.options()
      paper.encode(model, options, lambda x: spilled.append(x.size))
    self.assertEqual(sum(spilled), message.size)
    self.assertGreater(len(spilled), 5)
    self.assertLess(max(held), message.size / 2)

  def test_asks_for_a_few_layers_at_a_time_in_order(self):
    model, encoded, message = _encoded()
    asked = []

    class Source:
      config = model.config
      records = model.records
      specs = staticmethod(model.specs)

      def read(self, record):
        asked.append(record)
        return model.read(record)

    again, words = paper_test.encode(Source())
    self.assertEqual(again.layout, encoded.layout)
    np.testing.assert_array_equal(words, message)
    self.assertEqual(asked, ['layers.0', 'embed', 'layers.1', 'head'])

  def test_last_segment_comes_first(self):
    model, encoded, message = _encoded()
    order = list(paper_test.decode(encoded, message, model.config))
    self.assertIn('head/kernel', order[:3])
    self.assertEqual(order[-1], 'embed/tokens')
    self.assertLen(set(order), len(order))


class MalformedTest(parameterized.TestCase):
  def _assert_refused(self, *, entropy=False, at_once=False, **changed):
    model, encoded, message = _encoded(entropy)
    given = {
      'layout': encoded.layout,
      'streams': {'message': message, **encoded.streams},
      'config': model.config,
    } | changed
    with self.assertRaises(ValueError):
      decoded = paper.decode(paper_test.options(entropy=entropy), **given)
      if not at_once:
        list(decoded)

  @parameterized.named_parameters(
    ('field_missing', lambda layout: {k: layout[k] for k in layout if k != 'sampled'}),
    ('fixed_many', lambda layout: layout | {'fixed': 15}),
    ('sampled_few', lambda layout: layout | {'sampled': layout['sampled'][1:]}),
    ('coders_many', lambda layout: layout | {'coders': [{}]}),
    ('array_missing', lambda layout: layout | {'arrays': _without_one(layout)}),
    ('wider', lambda layout: _with(layout, 'arrays', 'head/kernel', ['float32', 0])),
  )
  def test_layouts_are_refused_before_anything_is_decoded(self, change):
    _, encoded, _ = _encoded()
    layout = change(copy.deepcopy(encoded.layout))
    self._assert_refused(layout=layout, at_once=True)

  def test_a_rotation_that_the_arrays_cannot_give_is_refused_at_once(self):
    model, encoded, message = _encoded()
    config = dataclasses.replace(
      model.config,
      hidden_size=40_000,
      num_layers=1,
      vocab_size=1,
      parallel_block=True,
      segment_widths=(40_000, 1),
    )
    paths = (path for part in segments.parts(config) for path in part.all)
    arrays = {path: ['float16', 0] for path in paths}
    layout = {'fixed': 0, 'sampled': [True, False], 'arrays': arrays}
    streams = {'message': message, **encoded.streams}
    with self.assertRaisesRegex(ValueError, 'segment 0: a rotation of 799980001 int'):
      paper.decode(paper_test.options(), layout, streams, config)

  def test_other_configs_are_refused(self):
    other = random_models.sliced_llama([14, 14, 14, 14, 13], np.float16).config
    self._assert_refused(config=other)
    dense = paper_test._load('llama-tiny-dense').config
    self._assert_refused(config=dense, at_once=True)

  def test_wrong_digests_name_the_array(self):
    model, encoded, message = _encoded()
    layout = _with(encoded.layout, 'arrays', 'layers.1/mlp/up/kernel', ['float16', 1])
    with self.assertRaisesRegex(ValueError, r'layers\.1/mlp/up/kernel: decoded'):
      paper_test.decode(encoded._replace(layout=layout), message, model.config)

  @parameterized.parameters(False, True)
  def test_streams_of_another_length_are_refused(self, entropy):
    _, encoded, message = _encoded(entropy)
    corrections = encoded.streams['corrections']
    for name, changed in (
      (
        'message',
        (message[1:], message[:-1], message[:0], np.append(message, message)),
      ),
      ('corrections', (corrections[1:], corrections[:-3], message[:0])),
    ):
      for words in changed:
        streams = {'message': message, **encoded.streams, name: words}
        self._assert_refused(entropy=entropy, streams=streams)
    streams = {'message': message.view(np.uint8), **encoded.streams}
    self._assert_refused(entropy=entropy, streams=streams, at_once=True)

  def test_coders_of_other_arrays_are_refused(self):
    _, encoded, _ = _encoded(True)
    coders = encoded.layout['coders']
    layout = encoded.layout | {'coders': [coders[0], coders[2], coders[1], *coders[3:]]}
    self._assert_refused(layout=layout, entropy=True)


@pytest.mark.slow
class DamageTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_damaged_words_give_the_arrays_or_a_value_error(self, entropy):
    model, encoded, message = _encoded(entropy)
    harmless = 0
    streams = {'message': message, **encoded.streams}
    for name, words in streams.items():
      for place in np.linspace(0, words.size - 1, 40).astype(int):
        damaged = words.copy()
        damaged[place] ^= 1 << place % 16
        given = paper_test.options(entropy=entropy), encoded.layout
        try:
          decoded = paper.decode(*given, streams | {name: damaged}, model.config)
          harmless += bool(list(decoded))
        except ValueError:
          pass
    self.assertLess(harmless, 3)  # a word may be padding


def _with(layout, field, key, value):
  return layout | {field: layout[field] | {key: value}}


def _without_one(layout):
  return {k: x for k, x in layout['arrays'].items() if k != 'head/kernel'}


if __name__ == '__main__':
  absltest.main()
