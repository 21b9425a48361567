"""`python -m mifo.app`: a page to draw on."""
