"""Package definition: `pip install .` installs MIFO, its commands, mifo_lora and toybox."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGES = ("imagelab", "mifo", "mige", "mifo_page", "toybox", "experiments")
TEXT = (HERE / "mifo/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', TEXT, re.MULTILINE)[1]
NEEDED = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
GRADIO = "gradio>=6.31,<7"  # the page
BITSANDBYTES = "bitsandbytes>=0.50"  # --optimizer adamw8bit

setup(
    name="mifo",
    version=VERSION,
    description="Learn several instances from one image and paint them inside boxes (MIFO)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
        "mifo_lora",
    ],
    package_dir={"mifo_lora": "lora-master/mifo_lora"},
    py_modules=[
        "semantic_learning",
        "semantic_synthesis",
        "semantic_evaluation",
        "semantic_export",
        "visual_box_mask",
    ],
    package_data={
        "mifo_page": ["*.css", "*.html", "*.js"],
        "toybox.scenes": ["sprites/*"],
        "toybox.stable_diffusion": ["weights/*", "weights/*/*"],
        "toybox.classifier": ["classifier.*"],
        "toybox.mige": ["weights/*", "weights/*/*"],
    },
    license="MIT",
    license_files=["LICENSE", "toybox/scenes/sprites/LICENSE"],
    python_requires=">=3.11",
    install_requires=NEEDED,
    extras_require={
        "app": [GRADIO],
        "8bit": [BITSANDBYTES],
        "test": [
            "pytest>=8",
            "hypothesis>=6",
            "peft>=0.21",
            "pytest-xdist>=3.8",
            "import-linter>=2.1",
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
            "mige-generate = mige.generate:main",
            "mige-edit = mige.edit:main",
            "mige-convert = mige.convert:main",
            "mige-start = mige.start:main",
            "mige-features = mige.features:main",
            "mige-train = mige.train:main",
            "mige-benchmark = mige.benchmark:main",
        ],
        "imagelab.models": ["toybox = toybox.stable_diffusion:FOLDER"],
        "mige.models": ["toybox = toybox.mige:FOLDER"],
        "imagelab.features": ["toybox = toybox.classifier.features:feature_space"],
    },
)
