"""Programs that measure the library. The library does not import them."""
