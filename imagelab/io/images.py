"""Reading pictures and masks: upright, in 8-bit sRGB, of checked size, nothing of them but pixels.

Every picture of a user's is read here, with numpy and Pillow alone: JPEG, PNG or WebP, whatever the
file is called. Sizes are (width, height) in pixels, arrays are [height, width].
"""

import hashlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from imagelab.errors import UserError, cut
from imagelab.io.masks import alpha_of, has_alpha, read_inside

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 100_000_000
MAX_BYTES = 2**30  # of a file
MAX_ASPECT = 1.5  # long side over short side, beyond which a picture is squeezed


class MissingPicture(UserError):
    """There is no file ``path``; ``advice``: what to do, which ends the sentence."""

    def __init__(self, path: Path, advice: str = "give a JPEG, PNG or WebP file that is there"):
        super().__init__(f"there is no picture {cut(str(path))}; {advice}")
        self.path, self.advice = path, advice

    def __reduce__(self) -> tuple:
        """Made anew of the same path in another process, in place of its sentence."""
        return type(self), (self.path, self.advice)


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    image: as viewers show it, which is upright, but in its own mode and colours.
    is_exact: its values are those that were painted, as of a PNG.
    stored_size: before its EXIF orientation was applied; ``was_turned``: whether it asked for that.
    sha256: of the bytes of the file, hexadecimal.
    """

    path: Path
    image: Image.Image
    is_exact: bool
    stored_size: tuple[int, int]
    was_turned: bool
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as viewers show it."""
        return self.image.size

    @property
    def has_alpha(self) -> bool:
        """Whether it may be transparent somewhere."""
        return has_alpha(self.image)

    def as_rgb(self) -> Image.Image:
        """In 8-bit sRGB, with white behind transparent places."""
        image, alpha = self._in_srgb(), alpha_of(self.image)
        if alpha is None:
            return image
        white = Image.new("RGB", image.size, "white")
        return Image.composite(image, white, Image.fromarray(alpha))

    def as_mask(self, label: str | None = None) -> np.ndarray:
        """True [h, w] inside, by the rule of docs/masks.md.

        Args:
            label: what is inside of a file with several labels; see `imagelab.io.masks`.

        Raises:
            UserError: nothing is inside, or there are two ways to read the file.
        """
        return read_inside(self.image, str(self.path), label, self.is_exact)

    def _in_srgb(self) -> Image.Image:
        """Its colours alone, by its colour profile if it has one, as of phones and cameras."""
        image, profile = self.image, self.image.info.get("icc_profile")
        if image.mode.startswith("I"):  # 16-bit greys
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if profile:
            try:
                own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
                mode = {"GRAY": "L", "RGB ": "RGB"}.get(own.profile.xcolor_space)
                if mode and image.mode != "CMYK":
                    image = image.convert(mode)
                return ImageCms.profileToProfile(
                    image, own, ImageCms.createProfile("sRGB"), outputMode="RGB"
                )
            except (OSError, ImageCms.PyCMSError) as error:
                log.warning("%s: its colour profile cannot be used (%s)", self.path.name, error)
        return image.convert("RGB")


def read_image(path: Path) -> Image.Image:
    """A picture as viewers show it, in 8-bit sRGB; its pixels and no metadata."""
    return Image.fromarray(np.array(open_picture(path).as_rgb()))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture that was opened elsewhere, as `read_image` would have read it."""
    upright = ImageOps.exif_transpose(image)
    return Picture(Path("a picture"), upright, False, image.size, False, "").as_rgb()


def read_mask(path: Path, label: str | None = None) -> np.ndarray:
    """True [h, w] inside, at the size of the file; see `Picture.as_mask`."""
    return open_picture(path).as_mask(label)


def open_unchanged(path: Path, sha256: str) -> Picture:
    """Decode a file that was read before; a UserError where it is not any more what it was."""
    picture = open_picture(path)
    if picture.sha256 != sha256:
        raise UserError(f"{path} has changed since the work began; run the command again")
    return picture


def open_picture(path: Path) -> Picture:
    """Decode a file, once its header says that it is not too large, and turn it upright.

    Raises UserError for a file that is damaged, too large or of another format, and of this kind
    MissingPicture where there is none.
    """
    try:
        _check_file(path)
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingPicture(path) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, f"over {MAX_PIXELS // 1_000_000} megapixels") from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise _unreadable(path, error) from error
    width, height = stored_size = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise _too_large(path, in_pixels(stored_size))
    is_exact = image.format == "PNG"
    try:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: of a phone
        image.load()
        was_turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise _unreadable(path, error) from error
    if frames > 1:
        raise UserError(
            f"{path} is animated, with {frames} pictures; save the one that is meant by itself"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    return Picture(path, image, is_exact, stored_size, was_turned, sha256)


def _check_file(path: Path) -> None:
    """Raises UserError for what could be read without an end."""
    if path.exists() and not path.is_file():  # a folder, a device, a pipe
        raise UserError(f"{path} is no file; give a JPEG, PNG or WebP file")
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise _too_large(path, f"{path.stat().st_size >> 20} MiB")


def _too_large(path: Path, size: str) -> UserError:
    return UserError(
        f"{path} is {size}, which is too large; shrink it, and masks together with their picture, "
        f"to at most {MAX_SIDE} pixels a side and {MAX_PIXELS // 1_000_000} megapixels"
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return UserError(
        f"{cut(str(path))} cannot be read as a picture ({reason}); give a JPEG, PNG or WebP file"
    )


# ----------------------------------------------------------------------------------------------
# sizes


def working_size(
    source: tuple[int, int], resolution: int, multiple: int, resize: str = "aspect"
) -> tuple[int, int]:
    """The (width, height) that a picture of size ``source`` is worked on at.

    "aspect": the short side becomes ``resolution``, the long side keeps its proportion up to
    MAX_ASPECT times that; a longer picture is squeezed. "squash": both become ``resolution``.
    All sides are rounded to ``multiple``, what the VAE and the UNet together halve evenly.
    """
    if resize not in ("aspect", "squash"):
        raise UserError(f"resize is {resize!r}; choose 'aspect' or 'squash'")
    if resolution < multiple:
        raise UserError(
            f"a resolution of {resolution} pixels is too small for the model; "
            f"use at least {multiple}"
        )
    short = round(resolution / multiple) * multiple
    if resize == "squash":
        return short, short
    width, height = source
    proportional = round(short * max(source) / min(source) / multiple) * multiple
    longest = int(MAX_ASPECT * short / multiple) * multiple
    long = min(proportional, longest)
    return (long, short) if width >= height else (short, long)


def resize_mask(inside: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a bool mask [h, w] to ``size``.

    A pixel is inside when the mask covers it at least half as much as it covers the pixel it
    covers most: the usual threshold of ½ for a solid mask, and a thin one does not vanish.
    """
    source = Image.fromarray(inside.astype(np.float32))
    covered = np.asarray(source.resize(size, Image.Resampling.BOX))
    return covered >= covered.max() / 2


def mask_window(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the bounding box of a mask, bool [h, w] with a pixel inside."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def proportion(mask: np.ndarray) -> float:
    """Width over height of the bounding box of a mask, bool [h, w] with a pixel inside."""
    down, across = mask_window(mask)
    return (across.stop - across.start) / (down.stop - down.start)


def in_pixels(size: tuple[int, int]) -> str:
    """A size in the words of a message."""
    return f"{size[0]} x {size[1]} pixels"
