"""The machine: files, memory, checksums, signals, progress, typed JSON."""
