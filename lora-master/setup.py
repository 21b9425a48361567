"""Package definition: `pip install ./lora-master` installs the import name `mifo_lora`."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

setup(
    name="mifo-lora",
    version="0.1.0",
    description="LoRA on loralib layers: inject, train, merge, exchange with diffusers and kohya",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=["mifo_lora"],
    python_requires=">=3.11",
    install_requires=(HERE / "requirements.txt").read_text(encoding="utf-8").split(),
)
