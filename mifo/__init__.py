"""MIFO: learn instances from one image and paint each inside its box.

import mifo

toys = mifo.learn("example/toy_car", seed=0)  # or mifo.load("toy_car"), learned before
pictures = toys.paint("a photo of <asset0> and <asset1>", seed=0)
pictures.save("output/toy_car")
"""

__all__ = ["learn", "load"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """``learn`` and ``load`` load torch; whatever imports a part of this package need not."""
    if name in __all__:
        from mifo import facade

        return getattr(facade, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
