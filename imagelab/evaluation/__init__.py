"""What pictures show: features, measures, the run over many pictures, the report."""
