"""Runs the program `rotbits`: python -m rotbits_jax COMMAND."""

import sys

from rotbits_jax.cli import main

sys.exit(main.main())
