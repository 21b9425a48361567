"""MIGE's method (arXiv 2502.21291): instruction, encoders, fusion, guidance, sampler."""
