"""Starts, watches and stops the processes of a cluster. Carries no requests and no data."""
