"""Programs for the people who work on Penstock. Nothing that serves a request may import from here."""
