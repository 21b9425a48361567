"""Where a learning run reads and writes."""

from pathlib import Path

from imagelab.io.atomic import readable
from mifo.learned import MANIFEST
from mifo.learning.config import LearningConfig

CHECKPOINT = "checkpoint.safetensors"


def instance_folder(config: LearningConfig) -> Path:
    """Where the photo and the masks are."""
    return Path(config.folder_path) / config.instance


def target_folder(config: LearningConfig) -> Path:
    """Where the learned folder will be."""
    return Path(config.output_dir) / config.instance


def work_folder(config: LearningConfig) -> Path:
    """Where the checkpoint of the unfinished run lies."""
    return Path(config.output_dir) / f".{config.instance}.work"


def is_begun(config: LearningConfig) -> bool:
    """Is there an unfinished run to go on with?"""
    return (work_folder(config) / CHECKPOINT).is_file()


def is_learned(config: LearningConfig) -> bool:
    """Is the learned folder there?"""
    return (readable(target_folder(config)) / MANIFEST).is_file()
