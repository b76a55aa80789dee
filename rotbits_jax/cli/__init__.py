"""The commands of the `rotbits` program: one thin absl program each."""
