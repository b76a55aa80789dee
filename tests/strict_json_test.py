"""JSON of strangers is JSON, and bounded."""

from absl.testing import absltest

from rotbits_jax.system import strict_json


class LoadsTest(absltest.TestCase):
  def test_json_is_parsed(self):
    for text, expected in (
      (b'{"a": [1, -2.5, "\\u00fc", null, true]}', {'a': [1, -2.5, 'ü', None, True]}),
      (b'1e308', 1e308),
      (b'-9223372036854775808', -(1 << 63)),
      (b'"\\ud83d\\ude00"', '😀'),
      (b'[' * 64 + b']' * 64, None),
    ):
      with self.subTest(text=text):
        value = strict_json.loads(text)
        if expected is not None:
          self.assertEqual(value, expected)

  def test_anything_else_is_refused(self):
    for text, problem in (
      (b'', 'not JSON'),
      (b'\xff', 'not JSON'),
      (b'{"a": 1,}', 'not JSON'),
      (b'NaN', 'NaN is not JSON'),
      (b'[-Infinity]', '-Infinity is not JSON'),
      (b'1e999', '1e999 is too large'),
      (b'-1e999', '-1e999 is too large'),
      (b'1' * 20, 'is too large'),
      (b'1' * 5000, 'is too large'),
      (b'{"a": 1, "b": 2, "a": 1}', "'a' is repeated"),
      (b'"\\ud800"', 'surrogate'),
      (b'{"\\udc00": 1}', 'surrogate'),
      (b'[' * 65 + b']' * 65, 'nested too deeply'),
      (b'{"a":' * 65 + b'1' + b'}' * 65, 'nested too deeply'),
      (b'[' * 100_000, 'nested too deeply'),
    ):
      with self.subTest(problem=problem), self.assertRaisesRegex(ValueError, problem):
        strict_json.loads(text)
