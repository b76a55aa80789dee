"""The machine: shared memory, checksums, safe outputs, progress, strict JSON."""
