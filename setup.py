"""Package definition: `pip install ./lora-master .` installs MIFO, its commands and toybox."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
NEEDED = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
GRADIO = "gradio>=6.31,<7"  # the page of mifo.app
BITSANDBYTES = "bitsandbytes>=0.50"  # --optimizer adamw8bit

setup(
    name="mifo",
    version="0.1.0",
    description="Learn several instances from one image and paint them inside boxes (MIFO)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=["mifo", "mifo.app", "toybox"],
    py_modules=[
        "semantic_learning",
        "semantic_synthesis",
        "semantic_evaluation",
        "semantic_export",
        "visual_box_mask",
    ],
    package_data={
        "mifo.app": ["*.css", "*.html", "*.js"],
        "toybox": ["sprites/*", "model/*", "model/*/*", "classifier.*"],
    },
    python_requires=">=3.11",
    install_requires=["mifo-lora" if name == "./lora-master" else name for name in NEEDED],
    extras_require={
        "app": [GRADIO],
        "8bit": [BITSANDBYTES],
        "test": [
            "pytest>=8",
            "hypothesis>=6",
            "peft>=0.21",
            "pytest-xdist>=3.8",
            GRADIO,
            BITSANDBYTES,
            "playwright>=1.65",
        ],
    },
    entry_points={
        "console_scripts": [
            "mifo-learn = semantic_learning:main",
            "mifo-synthesise = semantic_synthesis:main",
            "mifo-evaluate = semantic_evaluation:main",
            "mifo-export = semantic_export:main",
            "mifo-boxes = visual_box_mask:main",
        ]
    },
)
