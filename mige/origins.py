"""Where the parts of a model to begin with come from: folders, or models on the hub."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import read_json, read_tensors
from imagelab.models.loading import read_part
from imagelab.models.parts import END
from imagelab.models.sources import NOT_THE_HUB
from mige.release import State
from mige.sizes import build

CONFIG = "config.json"


@dataclass(frozen=True)
class Origin:
    """A folder, or a model on the hub, and the option that names it.

    Attributes:
        below: the folder of a part within it.
        offline: the hub is not asked; what it once gave may be there.
    """

    source: str
    option: str
    below: str = ""
    offline: bool = False

    @property
    def advice(self) -> str:
        return f"fetch it again, or give another {self.option}"

    def part(self, name: str) -> "Origin":
        return replace(self, below=name)

    def fetch(self, *names: str) -> Path:
        """The part's folder, with these files in it, where the model has them."""
        path = Path(self.source).expanduser()
        if path.is_dir():
            return path / self.below
        if self.source.count("/") != 1 or self.source.startswith((".", "~", "/")):
            raise UserError(
                f"there is no folder {shorten(self.source, 200)}; give another {self.option}"
            )
        wanted = [f"{self.below}/{name}" if self.below else name for name in names]
        return self._download(wanted) / self.below

    def _download(self, wanted: list[str]) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(self.source, allow_patterns=wanted, local_files_only=self.offline)
            )
        except Exception as error:  # whatever a network brings
            if isinstance(error, OSError) and error.errno in NOT_THE_HUB:
                raise
            how = "is not in the local cache" if self.offline else "could not be fetched"
            raise UserError(
                f"{shorten(self.source)} is no folder, and as a model of the hub it {how} "
                f"({type(error).__name__}); give a folder by {self.option}"
            ) from error


@dataclass(frozen=True)
class Origins:
    """Where the parts come from; PixArt-α has a T5, its tokenizer and an autoencoder as well."""

    pixart: Origin
    blip2: Origin
    t5: Origin | None = None
    vae: Origin | None = None

    @classmethod
    def of(
        cls,
        pixart: str,
        blip2: str,
        t5: str | None = None,
        vae: str | None = None,
        offline: bool = False,
    ) -> "Origins":
        given = {"pixart": pixart, "blip2": blip2, "t5": t5, "vae": vae}
        return cls(**{
            name: Origin(source, f"--{name}", offline=offline)
            for name, source in given.items()
            if source is not None
        })  # fmt: skip

    @property
    def folders(self) -> list[Path]:
        """Those on the disk."""
        given = (self.pixart, self.blip2, self.t5, self.vae)
        paths = [Path(each.source).expanduser() for each in given if each is not None]
        return [path for path in paths if path.is_dir()]


# ----------------------------------------------------------------------------------------------
# files


def read_weights(
    origin: Origin, stem: str, starts: tuple[str, ...] = ("",)
) -> tuple[list[Path], State]:
    """The safetensors files that hold a part's tensors, and the tensors, which stay on the disk.

    Args:
        starts: what the names begin with; other tensors, and shards without any, are not read.
    """
    files, state = needed_files(origin, stem, starts), {}
    for file in files:
        for each in starts:
            state |= read_tensors(file, origin.advice, finite=False, prefix=each)[0]
    return files, state


def needed_files(origin: Origin, stem: str, starts: tuple[str, ...]) -> list[Path]:
    """The files of a part's weights, fetched; of shards those that hold a tensor of these names."""
    name = f"{stem}{END}"
    index = f"{name}.index.json"
    folder = origin.fetch(CONFIG, index)
    if not (folder / index).is_file() or (folder / name).is_file():
        folder = origin.fetch(CONFIG, name)
        check_there(folder / name, origin.advice)
        return [folder / name]
    places = read_json(folder / index, {"weight_map": {}}, origin.advice)["weight_map"]
    names = sorted({str(place) for key, place in places.items() if key.startswith(starts)})
    if not names or any(each != Path(each).name or not each.endswith(END) for each in names):
        raise UserError(f"{folder / index} names no shards, or files elsewhere; {origin.advice}")
    folder = origin.fetch(CONFIG, index, *names)
    for each in names:
        check_there(folder / each, origin.advice)
    return [folder / each for each in names]


def check_there(file: Path, advice: str) -> None:
    """Raises UserError for a file of weights that is missing."""
    if not file.is_file():
        raise UserError(f"there is no {file} (pickled .bin weights are never read); {advice}")


def make_part(name: str, config: Mapping, origin: Origin, folder: Path) -> nn.Module:
    """An empty part; a UserError where no part has such sizes."""
    return read_part(lambda _: build(name, dict(config)), folder, origin.option)


def check_part(module: nn.Module, state: State, folder: Path, advice: str, start: str = "") -> None:
    """Raises UserError where a tensor of a part is missing, unknown, of another shape or kind.

    Args:
        start: what its names begin with, in the files.
    """
    own = module.state_dict()
    both = own.keys() & state.keys()
    wrong = {
        "lacks": own.keys() - state.keys(),
        "has, and the part does not know,": state.keys() - own.keys(),
        "has in another shape": {key for key in both if own[key].shape != state[key].shape},
        "has as whole numbers": {key for key in both if not state[key].is_floating_point()},
    }
    for how, names in wrong.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {how} {start}{shorten(min(names), 100)}{more}; {advice}")
