"""Fuzzing: whatever an untrusted file holds, reading it ends well or in a clear error.

python -m fuzz.run --jobs=2 --results=RESULTS.md
python -m fuzz.sweep --results=RESULTS.md
"""
