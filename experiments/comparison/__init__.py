"""The paper's comparison on toybox: MIFO against other losses, ranks and ways of painting."""
