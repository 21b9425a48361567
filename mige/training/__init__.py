"""Training MIGE: what a step reads, computes and learns, and how a run goes on."""
