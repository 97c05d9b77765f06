"""The transformer families in torch, driven by the checkpoint's config.

Knows batches of tokens and pages; no requests, no scheduling.
"""
