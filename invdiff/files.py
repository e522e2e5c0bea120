"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from invdiff.errors import InputError


def reserve(path: Path, size: int) -> None:
    """Fail with OSError unless a file can grow to a size, in bytes."""
    block = bytes(min(size, 2**20))
    with path.open("wb", buffering=0) as file:
        while size > 0:
            size -= file.write(block[:size])
        os.fsync(file.fileno())


class atomic_path:  # noqa: N801 used as a context manager
    """A temporary path beside the target that replaces it on success and vanishes on failure.

    Raises
    ------
    InputError
        On entry or exit, if the folder is missing or cannot be written, or the disk is full.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        try:
            handle, name = tempfile.mkstemp(
                dir=self.target.parent, prefix=f".{self.target.name}.", suffix=self.target.suffix
            )
        except OSError as error:
            raise InputError(f"Cannot write {self.target}: {error.strerror}.") from error
        os.close(handle)
        self.partial = Path(name)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                umask = os.umask(0)
                os.umask(umask)
                self.partial.chmod(0o666 & ~umask)  # mkstemp's 0600 would surprise
                self.partial.replace(self.target)
        except OSError as problem:
            raise InputError(f"Cannot write {self.target}: {problem.strerror}.") from problem
        finally:
            self.partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"Cannot write {self.target}: {error.strerror or error}.") from error
