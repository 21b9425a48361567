"""Features of training pictures: the autoencoder's posterior of each, made before training.

`python -m mige.features` writes them into a folder:

    features.json       what they are of: the autoencoder, the pictures' size; how many shards
    00000.safetensors   a shard: by a picture's path in the list, float32 [2c, h, w], which is its
    …                   unscaled posterior's mean, then its standard deviation

A picture's shard follows from its path alone. The release's own layout, a .npy file a picture, is
read as well.

Axes: c latent channels, h and w latent rows and columns.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from imagelab.errors import UserError, cut, shorten
from imagelab.io.tensors import misfit, read_json, tensor_names
from mige.data.records import FEATURE_FOLDERS, Record, RecordList, part_of
from mige.data.references import References, key_of, parts_of
from mige.folder import ADVICE as MODEL_ADVICE
from mige.folder import INDEX, PARTS, config_of, find_folder, parts_digest
from mige.latents import Posterior

FACTS, VERSION = "features.json", 1
FORM = {"version": int, "vae": str, "side": int, "latent_shape": [int], "shards": int}
MOST_SHARDS = 10_000_000
MOST_OPEN = 256  # shards that are kept open for reading
#: What a picture is of a record, and the release's folder of such.
ROLES = {"target": "vae", "entity": "vae_entity", "source": "vae_source"}
MAKE = "`python -m mige.features` makes them"
AGAIN = "remove this file, and run `python -m mige.features` again"


class Features(Protocol):
    """Posteriors of a list's pictures; it may be sent to other processes."""

    def posterior(self, record: Record, path: str, role: str) -> Posterior:
        """That of one picture of a record; UserError where it is missing or damaged.

        Args:
            role: one of ROLES.
        """

    def missing(self, records: RecordList, which: Iterable[int]) -> Iterator[str]:
        """A sentence for each picture of some records that has none."""


def open_features(folder: Path, model: str | Path) -> Features:
    """The features in a folder, which have to be of a model's autoencoder and size.

    In the release's layout nothing says what they are of, but for the size.
    """
    kind = Kind.of_model(model)
    if (folder / FACTS).is_file():
        return ShardedFeatures(folder, kind.vae, kind.latent_shape)
    if (folder / INDEX).is_file():
        raise UserError(f"{folder} is a model folder; give the folder that mige.features wrote")
    if any((folder / name).is_dir() for name in ROLES.values()):
        return ReleaseFeatures(folder, kind.latent_shape, kind.side)
    raise UserError(f"there are no features in {folder}; {MAKE}")


# ----------------------------------------------------------------------------------------------
# what features are of


@dataclass(frozen=True)
class Kind:
    """What features are of.

    Attributes:
        vae: sha256 of the autoencoder.
        side: pixels of a picture's side.
        latent_shape: (c, h, w).
    """

    vae: str
    side: int
    latent_shape: tuple[int, int, int]

    @classmethod
    def of_model(cls, model: str | Path) -> "Kind":
        """That of a model folder, of which the autoencoder alone is read."""
        folder = find_folder(str(model))
        vae = _config(folder, "vae", {"latent_channels": int, "block_out_channels": [int]})
        size = _config(folder, "transformer", {"sample_size": int})["sample_size"]
        channels, factor = vae["latent_channels"], 2 ** (len(vae["block_out_channels"]) - 1)
        if size < 1 or channels < 1:
            raise UserError(
                f"{folder} is a model of latents {channels}×{size}×{size}; {MODEL_ADVICE}"
            )
        return cls(parts_digest(folder, ["vae"]), size * factor, (channels, size, size))

    def facts(self, shards: int) -> dict:
        """What a folder says of its features."""
        return {"version": VERSION, **asdict(self), "shards": shards}


def _config(folder: Path, name: str, form: dict) -> dict:
    found = config_of(folder, name)
    if wrong := misfit(found, form):
        raise UserError(f"{folder / name / PARTS[name].config}: {wrong}; {MODEL_ADVICE}")
    return found


def read_shards(folder: Path, vae: str, latent_shape: tuple[int, int, int]) -> int:
    """How many shards a folder's features are in; UserError for those of another kind."""
    path = folder / FACTS
    found = read_json(path, FORM, "make the features anew in another folder")
    if found["version"] != VERSION:
        raise UserError(
            f"{path} is of version {found['version']}, and this program reads {VERSION}; make the "
            "features anew in another folder"
        )
    if found["vae"] != vae:
        raise UserError(
            f"{folder} holds features of another model: its autoencoder is "
            f"{shorten(found['vae'], 13)}, and this model's is {shorten(vae, 13)}; give that "
            "model, or features of this one"
        )
    if found["latent_shape"] != list(latent_shape):
        raise UserError(
            f"{folder} holds features of another size: latents {_shape(found['latent_shape'])}, "
            f"and this model's are {_shape(latent_shape)}; give that model, or features of this one"
        )
    if not 1 <= found["shards"] <= MOST_SHARDS:
        raise UserError(
            f"{path} tells of {found['shards']} shards; make the features anew in another folder"
        )
    return found["shards"]


def _shape(shape: Iterable[int]) -> str:
    return shorten("×".join(map(str, shape)))


def _posterior(
    values: Tensor, latent_shape: tuple[int, int, int], name: str, then: str
) -> Posterior:
    """A posterior out of [2c, h, w]; a UserError names the file and what to do ``then``."""
    channels, height, width = latent_shape
    wanted = (2 * channels, height, width)
    if values.dtype != torch.float32 or tuple(values.shape) != wanted:
        kind = str(values.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} is {kind} {_shape(values.shape)}, and features of this model are float32 "
            f"{_shape(wanted)}; {then}"
        )
    found = Posterior(values[:channels], values[channels:])
    if not values.isfinite().all() or (found.deviation < 0).any():
        raise UserError(f"{name} holds NaN, infinity, or deviations below zero; {then}")
    return found


# ----------------------------------------------------------------------------------------------
# shards


def shard_path(folder: Path, shard: int) -> Path:
    """A shard's file."""
    return folder / f"{shard:05d}.safetensors"


class ShardedFeatures:
    """Features that `python -m mige.features` wrote, of a model's autoencoder and latents."""

    def __init__(self, folder: Path, vae_digest: str, latent_shape: tuple[int, int, int]):
        self.folder, self.latent_shape = folder, tuple(latent_shape)
        self.shards = read_shards(folder, vae_digest, latent_shape)
        self._open: OrderedDict[int, safe_open] = OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}  # open files cannot be sent

    def posterior(self, record: Record, path: str, role: str) -> Posterior:
        shard = key_of(path) % self.shards
        file, name = self._file(shard, path), shard_path(self.folder, shard)
        try:
            values = file.get_tensor(path)
        except Exception as error:  # a damaged file makes safetensors raise almost anything
            if path not in file.keys():  # noqa: SIM118 (no dict)
                raise self._lacking(path) from error
            raise _unreadable(name, error) from error
        return _posterior(values, self.latent_shape, f"{name}: {cut(path)}", AGAIN)

    def missing(self, records: RecordList, which: Iterable[int]) -> Iterator[str]:
        for shard, found in References.of_list(records, which).by_shard(self.shards):
            path = shard_path(self.folder, shard)
            lacking = found.without(tensor_names(path, AGAIN) if path.is_file() else ())
            for index, name in zip(lacking.records, lacking.paths(records), strict=True):
                yield f"{records.path}: record {index}: there are no features of {name}"

    def _file(self, shard: int, path: str) -> safe_open:
        """A shard that is open; the one that was read the longest ago makes room for it."""
        if shard not in self._open:
            name = shard_path(self.folder, shard)
            if not name.is_file():
                raise self._lacking(path)
            try:
                self._open[shard] = safe_open(name, framework="pt")
            except Exception as error:  # a damaged file makes safetensors raise almost anything
                raise _unreadable(name, error) from error
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _lacking(self, path: str) -> UserError:
        return UserError(f"there are no features of {cut(path)} in {self.folder}; {MAKE}")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as safetensors ({str(error)[:80]}); {AGAIN}")


# ----------------------------------------------------------------------------------------------
# the release's files


class ReleaseFeatures:
    """Features in the release's layout, a file a picture.

    root/{vae, vae_entity or vae_source}/{a part's folder}/{side}resolution/noflip/{stem}.npy holds
    float32 [2c, h, w]. The part is that of the target's path; of the picture's own path the name
    alone counts, so that two pictures may ask for one file, which is an error.
    """

    def __init__(self, root: Path, latent_shape: tuple[int, int, int], side: int):
        self.root, self.latent_shape, self.side = root, tuple(latent_shape), side

    def posterior(self, record: Record, path: str, role: str) -> Posterior:
        file = self.file_of(record, path, role)
        for other, its_role in parts_of(record):
            if other != path and self.file_of(record, other, its_role) == file:
                raise UserError(_shared(file, path, other))
        try:
            values = torch.from_numpy(np.load(file, allow_pickle=False))
        except FileNotFoundError:
            raise UserError(f"there is no file {file}; make the features of {cut(path)}") from None
        except Exception as error:  # a damaged file makes numpy raise almost anything
            raise UserError(
                f"{file} cannot be read as an array ({str(error)[:80]}); make it anew"
            ) from error
        return _posterior(values, self.latent_shape, str(file), "make it anew")

    def file_of(self, record: Record, path: str, role: str) -> Path:
        """Where a picture's features are.

        The only reference of a plain edit is its source, and lies with the sources.
        """
        part = part_of(record.target)
        if part is None:
            raise UserError(
                f"the path {shorten(record.target)!r} tells no folder of the release's features, "
                f"which are of {', '.join(FEATURE_FOLDERS)}; {MAKE} for any path"
            )
        kind = ROLES["source" if record.task == "edit" and role == "entity" else role]
        place = self.root / kind / FEATURE_FOLDERS[part] / f"{self.side}resolution" / "noflip"
        return place / f"{Path(path).stem}.npy"

    def missing(self, records: RecordList, which: Iterable[int]) -> Iterator[str]:
        files, keys, indices = array("Q"), array("Q"), array("q")
        for index in which:
            record = records[index]
            for path, role in parts_of(record):
                try:
                    file = self.file_of(record, path, role)
                except UserError as error:
                    yield f"{records.path}: record {index}: {error}"
                    break
                if not file.is_file():
                    yield f"{records.path}: record {index}: there is no {file}"
                files.append(key_of(str(file)))
                keys.append(key_of(path))
                indices.append(index)
        yield from self._shared(records, *map(np.asarray, (files, keys, indices)))

    def _shared(
        self, records: RecordList, files: np.ndarray, keys: np.ndarray, indices: np.ndarray
    ) -> Iterator[str]:
        """A sentence for each file that another picture has asked for already."""
        order = np.lexsort((indices, files))
        same_file = files[order][1:] == files[order][:-1]
        for at in np.flatnonzero(same_file & (keys[order][1:] != keys[order][:-1])):
            first, second = order[at], order[at + 1]
            paths = [
                self._asking(records[int(indices[n])], files[n], keys[n]) for n in (first, second)
            ]
            file = self.file_of(*paths[1])
            where = f"{records.path}: record {indices[second]}"
            yield f"{where}: {_shared(file, paths[1][1], paths[0][1])}"

    def _asking(self, record: Record, file: int, key: int) -> tuple[Record, str, str]:
        """The record, path and role that ask for a file."""
        return next(
            (record, path, role)
            for path, role in parts_of(record)
            if key_of(path) == key and key_of(str(self.file_of(record, path, role))) == file
        )


def _shared(file: Path, path: str, other: str) -> str:
    return f"{cut(path)} and {cut(other)} share {file}, which cannot be of both; {MAKE} by path"
