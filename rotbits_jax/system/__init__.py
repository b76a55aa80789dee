"""The machine: files, memory, checksums, progress, typed JSON."""
