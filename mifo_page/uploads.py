"""Where the page keeps the pictures that it is sent."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock

PREFIX = "mifo_page_"


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A temporary folder that goes with the page; those of pages that were killed go now.

    A page that was killed leaves the lock of its folder behind. Other folders of such a name stay.
    """
    for lock in Path(gettempdir()).glob(f".{PREFIX}*.lock"):
        left = lock.with_name(lock.name[1 : -len(".lock")])
        if left.is_dir() and not left.is_symlink():
            with suppress(UserError, OSError), folder_lock(left):  # not while a page runs
                shutil.rmtree(left)
    with TemporaryDirectory(prefix=PREFIX) as folder, folder_lock(Path(folder)):
        yield Path(folder)
