"""The file: container, manifest, reader, writer and report."""
