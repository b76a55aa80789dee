"""Config files of the presets: `rotbits encode --config=NAME` takes one of them."""
