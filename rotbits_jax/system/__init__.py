"""The machine: files, memory, checksums, plugins, signals, progress, typed JSON."""
