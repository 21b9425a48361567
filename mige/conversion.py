"""From the released weights to a model folder, part by part (see `mige.folder`)."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, replacing
from imagelab.io.tensors import UMASK, disk_errors, read_json
from imagelab.models.loading import quiet_libraries, read_part
from mige.folder import INDEX, PARTS, check_prefix, check_widths
from mige.method.sampler import ContinuousDPMSolver
from mige.method.wording import PREFIXES
from mige.release import (
    POSITIONS,
    State,
    check_exactly,
    check_positions,
    load_exactly,
    split_release,
)
from mige.sizes import build, configs_of
from mige.sources import (
    Sources,
    check_text_config,
    read_state,
    read_text_tokenizer,
    read_vae,
)
from mige.targets import PIPELINE, check_output, check_room

log = logging.getLogger(__name__)

SLOTS = 4  # pictures of an instruction, in the release
MOST_SHARD = "5GB"  # of a file of weights
ADVICE = "fetch the release again"


@dataclass
class Model:
    """What is to be written: each part's empty module and its tensors, and the tokenizer."""

    modules: dict[str, nn.Module]
    states: dict[str, State]
    tokenizer: object

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(_bytes(state) for state in self.states.values())


def convert(
    sources: Sources,
    output: Path,
    prefixes: Mapping[str, str] | None = None,
    heads: Mapping[str, int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a release as a model folder, which appears when it is whole.

    Args:
        prefixes: sentences before the instructions; None: empty ones.
        heads: numbers of heads of parts that are not as wide as the released ones.

    Raises:
        UserError: the release is not whole, or not MIGE's, or there is no room for the folder.
    """
    quiet_libraries()
    output = output.absolute()
    check_output(output, (sources.weights, sources.vae, sources.text), overwrite)
    model = read_model(sources, heads or {})
    check_room(output, model.size)
    write_folder(output, model, prefixes, overwrite=overwrite)


# ----------------------------------------------------------------------------------------------
# before any long work


def read_prefixes(path: Path) -> dict[str, str]:
    """The sentences before instructions, from a JSON file with the keys `PREFIXES`."""
    advice = f"write texts for {', '.join(PREFIXES)}"
    found = read_json(path, dict.fromkeys(PREFIXES, str), advice)
    for name in PREFIXES:
        check_prefix(found[name], f"{path}: {name}", advice)
    return {name: found[name] for name in PREFIXES}


def read_model(sources: Sources, heads: Mapping[str, int]) -> Model:
    """All parts of a release, checked; the weights stay on the disk."""
    tokenizer = read_text_tokenizer(sources.text)
    state = read_state(sources.weights)
    configs = configs_of(state, heads)
    check_text_config(sources.text, configs["text_encoder"])
    states = split_release(state)
    modules = {
        name: read_part(lambda _, n=name: build(n, configs[n]), sources.weights, "--weights")
        for name in configs
    }
    modules["vae"], states["vae"] = read_vae(sources.vae)
    for name, module in modules.items():
        check_exactly(module, states[name], name)
        if kinds := {t.dtype for t in states[name].values() if not t.is_floating_point()}:
            raise UserError(f"the release holds {min(map(str, kinds))} in {name}; {ADVICE}")
    check_positions(state[POSITIONS], configs["transformer"])
    check_widths(configs | {"vae": dict(modules["vae"].config)}, sources.weights.parent)
    words = configs["text_encoder"]["vocab_size"]
    if len(tokenizer) > words:
        raise UserError(
            f"the tokenizer in {sources.text} has {len(tokenizer)} pieces, and the trained T5 "
            f"knows {words}; give another --t5"
        )
    return Model(modules, states, tokenizer)


# ----------------------------------------------------------------------------------------------
# writing


def write_folder(
    output: Path,
    model: Model,
    prefixes: Mapping[str, str] | None = None,
    round_timesteps: bool = True,
    overwrite: bool = False,
) -> None:
    """Write a model folder, which appears when it is whole.

    Args:
        prefixes: sentences before the instructions; None: empty ones.
        overwrite: take the place of a model that is there.

    Raises:
        UserError: something else is there by now, or another process writes it.
    """
    settings = {
        "slots": SLOTS,
        "round_timesteps": round_timesteps,
        "prefixes": dict(prefixes or dict.fromkeys(PREFIXES, "")),
        "guidance": {},
    }
    check = partial(check_output, sources=(), overwrite=overwrite)
    with folder_lock(output, "--output"), replacing(output, check) as folder, disk_errors(output):
        write_model(folder, model)
        write_index(folder, settings)


def write_model(folder: Path, model: Model) -> None:
    """Write the parts, and let go of each as soon as it is written."""
    with tqdm(total=model.size, unit="B", unit_scale=True, desc="writing") as bar:
        for name in sorted(model.states):
            bar.set_postfix_str(name)
            module, state = model.modules.pop(name), model.states.pop(name)
            for key, tensor in state.items():
                if not tensor.isfinite().all():
                    raise UserError(
                        f"the release holds NaN or infinity in {key} of {name}; {ADVICE}"
                    )
            load_exactly(module, state, name)
            module.save_pretrained(folder / name, max_shard_size=MOST_SHARD)
            for file in (folder / name).iterdir():
                file.chmod(0o666 & ~UMASK)  # safetensors writes what only its owner may read
            bar.update(_bytes(state))
    model.tokenizer.save_pretrained(folder / "tokenizer")
    ContinuousDPMSolver().save_pretrained(folder / "scheduler")


def write_index(folder: Path, settings: Mapping[str, object]) -> None:
    """Write what a model folder says of itself, as diffusers does."""
    from diffusers import __version__

    facts = {"_class_name": PIPELINE, "_diffusers_version": __version__, **settings}
    facts |= {name: [part.library, part.classes[0]] for name, part in PARTS.items()}
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _bytes(state: Mapping[str, Tensor]) -> int:
    """Of a part's tensors; one with two names counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())
