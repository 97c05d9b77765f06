"""Remembers: block identities, the prefix index, and how blocks travel between workers.

Knows nothing of requests, models or gateways.
"""
