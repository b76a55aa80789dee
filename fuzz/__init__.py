"""Fuzzing: whatever an untrusted file holds, reading it ends well or in an error."""
