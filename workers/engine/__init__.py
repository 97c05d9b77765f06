"""Runs a step plan on the model: the only part of a worker that touches tensors. Decides nothing."""
