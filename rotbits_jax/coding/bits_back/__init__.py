"""Bits-back coding: codecs of rotations and of orders, and the combinator."""
