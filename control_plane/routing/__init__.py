"""Where a request goes: filter, score, pick. Pure functions over a view; no clock, no randomness, no I/O."""
