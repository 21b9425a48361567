"""MIFO: learn instances from one image and synthesise them inside boxes."""
