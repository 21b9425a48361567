"""What a bench says of one item, before its pictures are read."""

from dataclasses import dataclass
from pathlib import Path

from mige.items import Item
from mige.method.wording import safe_name


@dataclass(frozen=True)
class BenchItem:
    """One item, before its pictures are read.

    Attributes:
        item: what the model gets.
        task: whose mean it counts for.
        idx: its number in the release's file names.
        target: the picture that was wanted; None where nobody knows it.
        references: pictures of the subjects, where there is neither a target nor a source.
        caption: of the source; ``target_caption``: of what is wanted.
        entities: pictures of what ``noun`` calls, which the output is to hold.
    """

    item: Item
    task: str
    idx: int
    target: Path | None = None
    references: tuple[Path, ...] = ()
    mask: Path | None = None
    caption: str | None = None
    target_caption: str | None = None
    entities: tuple[Path, ...] = ()
    noun: str | None = None

    @property
    def source(self) -> Path | None:
        """The picture that is edited."""
        return None if self.item.source is None else self.item.paths[self.item.source]

    @property
    def against(self) -> str:
        """What the output is compared with: "target", "source" or "references"."""
        if self.target is not None:
            return "target"
        return "references" if self.source is None else "source"

    @property
    def has_equal_captions(self) -> bool:
        """Whether the captions tell of no change, so that there is no direction."""
        return self.caption is not None and self.caption == self.target_caption

    @property
    def compared(self) -> tuple[Path, ...]:
        """The pictures that the output is compared with."""
        known = {"target": (self.target,), "source": (self.source,), "references": self.references}
        return known[self.against]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every picture but the mask, each once."""
        return tuple(dict.fromkeys((*self.item.paths, *self.compared, *self.entities)))

    @property
    def release_name(self) -> str:
        """The release's file name of its output, without the seed of a subject and the ending."""
        if self.source is not None:
            return str(self.idx)
        stem = self.item.paths[0].stem if self.item.paths else ""
        return f"{stem}_{safe_name(self.item.text)}"
