"""MIGE's data: lists of records in the release's format, and what is read of them."""
