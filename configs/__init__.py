"""Config files: the presets with their options, and the published experiments.

`rotbits encode --config=NAME` takes a preset or an experiment, and
`rotbits accounting --config=NAME` an experiment. NAME may also be the path of a file.
setup.py maps this folder into the package, so that an installation has it, too.
"""
