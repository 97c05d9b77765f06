"""Calculates: one operation per file, each with its formula, shapes, `reference()` and launcher.

Imports nothing of ours. No state, no configuration, no knowledge of requests.
"""
