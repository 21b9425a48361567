"""Files and folders that appear only when they are whole.

Whoever writes does so aside, under a unique name in the same folder, and renames at the end. Who
writes a folder holds its `folder_lock`, which also clears away what a killed writer of that folder
left; what one of a single file left goes with a write to its folder a day later. After a loss of
power, too, the earlier content is there or the later one: a rename is on the disk before anything
is removed. A folder that is being replaced has a moment without its name: `readable` says where to
read it then. Readers never rename.
"""

import errno
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path

from imagelab.errors import UserError

log = logging.getLogger(__name__)
OLD = ".old"  # ends the hidden name of a folder while another takes its place
DAY = 86400  # seconds; nobody writes one file for so long
#: How a disk says that it knows no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
#: How it says that somebody else has a lock.
TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


# ----------------------------------------------------------------------------------------------
# files


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write a file to; it takes the place of ``path`` at the end, or is gone on an error.

    Several writers of one file do not meet: the last to finish stays.
    """
    with _unfinished(path) as aside:
        yield aside
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)


def write_json(path: Path, facts: dict) -> None:
    """Write facts as indented JSON; the file appears when it is whole."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_new(folder: Path, name: Callable[[int], str], content: bytes) -> Path:
    """Write a new file under the first of name(0), name(1), … that is free; its path.

    No file is ever replaced, even where several processes write at once.
    """
    with _unfinished(folder / "new") as aside:
        aside.write_bytes(content)
        _flush(aside)
        for number in count():
            path = folder / name(number)
            with suppress(FileExistsError):
                _move_new(aside, path)
                _flush(folder)
                return path


def _move_new(source: Path, target: Path) -> None:
    """Raises FileExistsError if the target is there."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: an empty file takes the name first
        target.open("xb").close()
        os.replace(source, target)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A path to write a file to, in a hidden folder of its own that is gone in the end.

    A folder, since libraries that write a file may put others of their own beside it.
    """
    sweep(path.parent, DAY)
    folder = _aside(path, "part")
    folder.mkdir()
    try:
        yield folder / "content"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path, age: float = 0) -> None:
    """Remove what killed writers of files left in a folder, if it is older than so many seconds.

    With an age below a day only for who holds a lock without which nobody writes there.
    """
    for path in folder.glob(".*.part"):
        if not re.fullmatch(r"\..+\.[0-9a-f]{12}\.part", path.name):
            continue
        with suppress(OSError):  # another process may sweep as well
            if time.time() - path.stat().st_mtime >= age:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _aside(path: Path, kind: str) -> Path:
    """A hidden path beside another that no other writer has, in any process on any machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{kind}")


def _flush(path: Path) -> None:
    """Wait until a file is on the disk, or the names in a folder."""
    if not path.is_dir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif os.name != "nt":  # Windows opens no folder
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks
                raise
        finally:
            os.close(file)


# ----------------------------------------------------------------------------------------------
# folders


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` to write to, gone in the end.

    The caller holds the `folder_lock` of ``target``, or of a folder that it is in.
    """
    aside = _aside(target, "new")
    try:
        aside.mkdir(parents=True)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replacing(target: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A `scratch_folder` to fill; it takes the place of ``target`` unless there is an error.

    Args:
        check: raises UserError where a folder must not be replaced, as
            :func:`~imagelab.io.folders.check_only` does. It looks at the end: meanwhile somebody
            may have put something there.
    """
    with scratch_folder(target) as aside:
        yield aside
        if check and target.is_dir():
            check(target)
        put(aside, target)


def put(source: Path, target: Path) -> None:
    """Give a finished file or folder the name ``target``, in place of what is there.

    The caller holds the `folder_lock` of ``target``, or of a folder that it is in.
    """
    for path in (source, *source.rglob("*")):
        if path.is_file() or path.is_dir():
            _flush(path)
    try:
        if source.is_dir() and os.path.lexists(target):  # a link that leads nowhere, too
            os.replace(target, _old(target))
        os.replace(source, target)
        _flush(target.parent)
    finally:
        recover(target)


def recover(target: Path) -> None:
    """Put back an earlier folder that `put` had moved away, or drop it if there is a later one.

    The caller holds the `folder_lock` of ``target``, which has called this, or of a folder above.
    """
    old = _old(target)
    if not os.path.lexists(old):
        return
    if not os.path.lexists(target):
        os.replace(old, target)
        return
    _flush(target.parent)  # a killed `put` may not have
    if old.is_symlink() or old.is_file():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def readable(target: Path) -> Path:
    """Where to read a folder: ``target``, or what `put` has moved away from there.

    The latter while another process is between its two renames, or was killed there.
    """
    if not target.exists() and _old(target).exists():
        return _old(target)
    return target


def folder_names(parent: Path, file: str) -> list[str]:
    """Names of the folders in ``parent`` that hold ``file``, sorted, read as `readable` says.

    Other hidden folders are left out.
    """
    found = {path.parent.name for path in parent.glob(f"*/{file}")}
    found |= {name[1 : -len(OLD)] for name in found if name[0] == "." and name.endswith(OLD)}
    return sorted(name for name in found if name and name[0] != ".")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}{OLD}")


@contextmanager
def folder_lock(path: Path, option: str = "name") -> Iterator[None]:
    """Within, no other process that asks for this lock writes the folder ``path``.

    What a killed holder left is cleared away first: its unfinished folders are removed, and a
    result that it had moved away is back. The operating system keeps the lock, on the hidden file
    ``.<name>.lock`` beside the folder, and frees it when the process ends. It is not reentrant.
    On a disk without locks nobody is kept out: see `lock_file`.

    Args:
        option: what to give another of, in the message.

    Raises:
        UserError: somebody else holds the lock.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    file = _lock(lock, path)
    if file is None:
        raise UserError(
            f"{path} is being written by another process; wait for it or give another {option}"
        )
    try:
        recover(path)
        unfinished = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.new")
        for left in path.parent.iterdir():
            if unfinished.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        _unlock(lock, file)


def _lock(path: Path, target: Path) -> int | None:
    """A descriptor of a file that is now locked for this process; None if somebody else has it.

    ``target``: what the lock is of.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_file(file, target, wait=False):
                os.close(file)
                return None
            with suppress(FileNotFoundError):
                if os.name == "nt" or os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except OSError:
            os.close(file)
            raise
        os.close(file)  # its last holder removed the file in the meantime: once more


def _unlock(path: Path, file: int) -> None:
    if os.name == "nt":
        os.close(file)  # Windows removes no open file, and others may have opened it
        return
    path.unlink(missing_ok=True)  # while it is locked: see `_lock`
    os.close(file)


# ----------------------------------------------------------------------------------------------
# locks


def lock_file(file: int, folder: Path, wait: bool = True) -> bool:
    """Lock an open file for this process, until it is closed; False if somebody else has the lock.

    Some disks, such as Lustre as it is often mounted and some of NFS, know no locks. There the work
    goes on without one, with a warning: it would otherwise be impossible.

    Args:
        folder: what the warning names, once a process.
        wait: until nobody else has it.
    """
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file, 1 << 40, os.SEEK_SET)  # a lock of a byte that nobody reads
            while True:
                try:
                    msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
                    break
                except OSError as error:  # LK_LOCK would give up after ten seconds
                    if not wait or error.errno not in TAKEN:
                        raise
                    time.sleep(0.1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            _warn_without_lock(folder)
        elif wait or error.errno not in TAKEN:
            raise
        else:
            return False
    return True


@cache
def _warn_without_lock(folder: Path) -> None:
    log.warning(
        "%s is on a disk that knows no locks: let no other process write there until this one ends",
        folder,
    )
