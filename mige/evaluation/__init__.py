"""Measuring what was painted: benches, outputs, measures, models, the report."""
