"""Config files: the presets with their options, and the published experiments.

`rotbits encode --config=NAME` takes one of them, or the path of another file. setup.py
maps this folder into the package, so that an installation has it, too.
"""
