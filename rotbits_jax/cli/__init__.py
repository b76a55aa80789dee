"""The commands: thin absl programs."""
