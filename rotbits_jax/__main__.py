"""Runs the program `rotbits`: python -m rotbits_jax COMMAND."""

import sys

from rotbits_jax.cli import main

if __name__ == '__main__':
  sys.exit(main.main())
