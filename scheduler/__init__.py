"""The scheduler actor: decides what every step computes. Knows no text, no tensor and no socket but its own four.

`core.py` is the pure machine, `process.py` the shell around it; every other file is a room of the core.
"""
