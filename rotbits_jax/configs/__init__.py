"""Config files of the presets, for `rotbits encode --config=NAME`."""
