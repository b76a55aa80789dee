"""Sliced models in transformers, where PyTorch and transformers are installed."""

import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

from scripts import transformers_sliced_check as check

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('default')]


@pytest.mark.parametrize('name', check.cases())
def test_sliced_model(name, tmp_path):
  case = check.cases()[name](tmp_path / 'model')
  for run in check.CHECKS.values():
    run(case)
