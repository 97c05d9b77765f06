"""Calculates: one operation per file, each with its formula, shapes, `reference()` and launcher.

`vectors`, `exponential`, `tile` and `team` are what operations are made of, `compiled` keeps numba's cache true.
Imports nothing of ours. No state, no configuration, no knowledge of requests.
"""
