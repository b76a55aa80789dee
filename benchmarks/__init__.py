"""Programs that measure; the library does not import them."""
