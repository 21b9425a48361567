"""The trained model, as a folder like the one that training began with.

What did not learn is taken over file by file, so it is the same to the bit, and features that were
made with the autoencoder stay valid. Its files of weights are shared with that folder where the
disk can; configs, which people edit, are copies. Weights that learned whole are written in float32;
a LoRA is merged into weights of the precision that they had.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from imagelab.io.atomic import folder_lock, replacing
from imagelab.io.folders import check_only
from imagelab.io.tensors import read_tensors, write_tensors
from imagelab.models.tokenizers import ADVICE, TOKENIZER_CONFIG
from imagelab.training.sharding import whole
from mifo_lora import LoRALinear
from mige.folder import CONTENTS, INDEX, PARTS, find_weights
from mige.training.model import MODULES, TrainedModel


def write_model(model: TrainedModel, source: Path, target: Path, is_writer: bool) -> None:
    """Write a model folder in place of what is there; all processes call this together.

    Args:
        source: the folder that training began with.
    """
    changes = {name: dict(_changes(model.parts[name], is_writer)) for name in MODULES}
    if not is_writer:
        return
    check = partial(check_only, own=CONTENTS)
    with folder_lock(target, "--output"), replacing(target, check) as aside:
        shutil.copyfile(source / INDEX, aside / INDEX)
        for name, part in PARTS.items():
            (aside / name).mkdir()
            for file in _described(source / name, part):
                shutil.copyfile(file, aside / name / file.name)
            for file in find_weights(source / name, part) if part.weights else []:
                _write_weights(file, aside / name / file.name, changes.get(name, {}))


def _described(folder: Path, part) -> Iterator[Path]:
    """The files of a part that are no weights."""
    names = {part.config, TOKENIZER_CONFIG, "tokenizer.json"} if not part.weights else {part.config}
    if part.weights:
        names.add(f"{part.weights}.safetensors.index.json")
    yield from (folder / name for name in sorted(names) if (folder / name).is_file())


def _changes(module: nn.Module, is_writer: bool) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """Names of a part's tensors that learned, each with what it became, or is to be added to it."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}
    for name, layer in layers.items():
        a, b = whole(layer.lora_A.detach()), whole(layer.lora_B.detach())
        if is_writer:
            yield f"{name}.weight", ((b @ a).cpu() * layer.scaling, True)
    learned = {id(p) for p in module.parameters() if p.requires_grad}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in learned and name.rpartition(".")[0] not in layers:
            value = whole(parameter.detach())
            if is_writer:
                yield name, (value.cpu(), False)


def _write_weights(source: Path, target: Path, changes: dict[str, tuple[Tensor, bool]]) -> None:
    """A file of weights with what has changed in it."""
    if not changes:
        _take_over(source, target)
        return
    tensors, metadata = read_tensors(source, ADVICE)
    for name in tensors.keys() & changes.keys():
        value, is_added = changes[name]
        old = tensors[name]
        tensors[name] = (old.float() + value).to(old.dtype) if is_added else value.float()
    write_tensors(target, tensors, metadata)


def _take_over(source: Path, target: Path) -> None:
    """The same file of weights under another name, where the disk can; else a copy.

    What may not be written is copied: a new file can be flushed, and later be removed.
    """
    file = source.resolve()
    if os.access(file, os.W_OK) and file.stat().st_mode & stat.S_IWUSR:
        with suppress(OSError):
            os.link(file, target)
            return
    shutil.copyfile(file, target)
