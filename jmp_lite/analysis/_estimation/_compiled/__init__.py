"""Bytes, launches and time of a compiled XLA program, read from its text; compiled for a device that need not exist.

Read ``_hlo`` first, the text as data; then ``_touched``, what a launch touches, and ``_cost``, what a program moves.
"""
