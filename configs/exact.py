"""Entropy coding alone: every tensor comes back bit for bit."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({'preset': 'exact'})
