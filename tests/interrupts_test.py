"""Signals become exceptions, and none of them is lost."""

import signal

import pytest

from rotbits_jax.system import interrupts
from rotbits_jax.system import progress


class Rude:
  """Gets a signal while it is deleted, where Python ignores exceptions."""

  def __del__(self):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_is_an_exception_with_its_number(name):
  number = getattr(signal, name)
  before = signal.getsignal(number)
  with pytest.raises(interrupts.Stopped) as caught, interrupts.raised():
    signal.raise_signal(number)
  assert caught.value.signal == number
  assert signal.getsignal(number) == before
  interrupts.check()  # it is over


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_lost_exception_is_raised_at_the_next_record():
  bar = progress.Progress('work', 3, 'record', show=False)
  with interrupts.raised():
    bar.update()
    rude = Rude()
    del rude
    with pytest.raises(interrupts.Stopped):
      bar.update()


def test_an_error_that_a_signal_becomes_is_the_signal():
  def load():
    try:
      signal.raise_signal(signal.SIGTERM)
    except interrupts.Stopped as error:
      raise ImportError('of an extension') from error

  with pytest.raises(interrupts.Stopped), interrupts.raised():
    load()


def test_an_ignored_signal_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with interrupts.raised():
      signal.raise_signal(signal.SIGHUP)
  finally:
    signal.signal(signal.SIGHUP, before)
