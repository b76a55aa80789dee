"""Fuzzing: whatever a stranger's file holds, reading it ends well or in a clear error.

python -m fuzz.run --target=container --executions=100000
python -m fuzz.sweep --results=RESULTS.md
"""
