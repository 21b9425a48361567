"""The paper's comparison on toybox: MIFO's attention loss against others, with boxes or without."""
