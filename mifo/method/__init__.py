"""The paper's equations: losses, regions, control of the attention, sampling."""
