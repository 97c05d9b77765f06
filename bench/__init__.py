"""One file per claim: each prints a table, and one JSON line last. Nothing of the product imports these."""
