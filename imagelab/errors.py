"""What may go wrong, and how it is told."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What a user did wrong: one sentence with the value and what to do. Exit code 2."""


#: What files and folders are called while they are written (`imagelab.io.atomic`): of no interest.
ASIDE = re.compile(r"\.([^/]+)\.[0-9a-f]{12}\.(?:new|part)(?:/.*)?")
#: What is told in a sentence; anything else is a fault of the program and keeps its traceback.
FAILURES = (UserError, OSError, FloatingPointError, MemoryError)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Within, the RuntimeError of torch that is out of memory is a MemoryError, one of FAILURES."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise MemoryError(str(error)) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU."""
    signs = ("out of memory", "can't allocate memory", "alloc_failed")
    is_told = any(sign in str(error).lower() for sign in signs)
    return is_told or type(error).__name__ == "OutOfMemoryError"


def sentence(error: Exception) -> str:
    """What a failure means to a user, in one line; nothing in it is longer than 200 characters."""
    return re.sub(r"\S{201,}", lambda found: cut(found[0]), _sentence(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return (
            "there is not enough memory; what takes less, where the command has it: "
            "--gradient_checkpointing for learning, --batch_size 1 and a smaller --width and "
            "--height for painting"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing that was there before has been changed: free some space"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return (
            "a file would be larger than this system lets it be; nothing that was there before has "
            "been changed: raise the limit (ulimit -f)"
        )
    if isinstance(error, OSError) and error.errno and error.filename:
        where = ASIDE.sub(r"\1", str(error.filename))
        is_gone = error.errno == errno.ENOENT
        advice = "give another path" if is_gone else "give another path or change its permissions"
        return f"{where}: {error.strerror}; {advice}"
    return " ".join(str(error).split())


# ----------------------------------------------------------------------------------------------
# what a message shows of a user's value


def shorten(text: str, limit: int = 60) -> str:
    """The beginning of a text, of at most ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def cut(text: str, limit: int = 200) -> str:
    """The beginning and the end of a text, of at most ``limit`` characters."""
    end = limit // 4
    return text if len(text) <= limit else f"{text[: limit - end - 1]}…{text[-end:]}"


def shown(value: object) -> str:
    """A value, shortened; of a whole number of more than 60 digits only how many it has."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {value.bit_length() * 0.30103:.0f} digits"
    return shorten(str(value))
