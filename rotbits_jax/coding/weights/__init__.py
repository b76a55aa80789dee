"""Arrays of weights to bytes and back."""
