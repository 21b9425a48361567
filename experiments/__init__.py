"""The papers' comparisons, re-run by one command each."""
