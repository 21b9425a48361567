"""toybox: a Stable Diffusion small enough to ship, and the toy scenes that it was trained on."""
