"""Files of a folder that are replaced together: after a kill at any moment there are all of the old or all of the new.

They are written into a folder inside the target, brought to disk, and that folder is renamed: one atomic step, before
which nothing of the target has changed, and after which the new files count. Then they are moved to their places, one
atomic step each. Whoever finds some that were not moved yet moves them (`settle`), or reads them where they are
(`current`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

STAGED = ".moe_lora.staged"
"""Files that are being written; without a process that does, they are garbage, which the next one removes."""
COMMITTED = ".moe_lora.commit"
"""Files that count and wait to be moved."""
SUPERSEDED = "superseded.json"
"""In that folder: names of files in the target which the new ones leave no place for."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give an empty folder, whose files at the end of the block take their places in `target`: all of them, or none.

    Raises
    ------
    ValueError
        If `target` is a file, or something in it is in the way. Nothing has changed then, nor after any other error of
        the block.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} must be a folder, it is a file")
    target.mkdir(parents=True, exist_ok=True)
    settle(target)
    staged = target / STAGED
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir()
    try:
        yield staged
        for name in _files(staged):
            _check_place(target, name)
        for path in (*staged.rglob("*"), staged):
            _sync(path)
        os.rename(staged, target / COMMITTED)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _sync(target)
    settle(target)


def supersede(staged: Path, names: Iterable[str]) -> None:
    """Note files of the target that go when the staged ones come."""
    (staged / SUPERSEDED).write_text(json.dumps(sorted(names)))


def pending(target: Path) -> bool:
    """Whether files that count wait to be moved."""
    return (target / COMMITTED).is_dir()


def settle(target: Path) -> None:
    """Move the files that wait to their places. Several processes may do so at once.

    Raises
    ------
    OSError
        If the folder can't be written.
    ValueError
        If a file would leave the folder.
    """
    if not pending(target):
        return
    committed = target / COMMITTED
    changed = {target}
    with suppress(FileNotFoundError):  # here and below: another process is faster
        for name in _superseded(committed, target):
            _check_place(target, name)
            (target / name).unlink(missing_ok=True)
            changed.add((target / name).parent)
    for name in _files(committed):
        _check_place(target, name)
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(committed / name, place)
        changed |= {place.parent, *(p for p in place.parents if p.is_relative_to(target))}
    for folder in changed:
        if folder.is_dir():
            _sync(folder)
    with suppress(FileNotFoundError):
        (committed / SUPERSEDED).unlink()
    for empty, _, _ in os.walk(committed, topdown=False):
        with suppress(FileNotFoundError):
            os.rmdir(empty)


def current(target: Path, name: str) -> Path:
    """Where the file that counts is, which is not necessarily there."""
    waiting = target / COMMITTED / name
    return waiting if waiting.exists() else target / name


def is_inside(name: object) -> bool:
    """Whether this is the name of something inside a folder, without detours."""
    if not isinstance(name, str) or {"\\", "\0"} & {*name}:
        return False
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and not {"..", "."} & {*path.parts, name}


def _files(folder: Path) -> list[str]:
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return [name for name in found if name != SUPERSEDED]


def _superseded(committed: Path, target: Path) -> list[str]:
    text = (committed / SUPERSEDED).read_text()
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(is_inside(name) for name in names):
        raise ValueError(f"{committed / SUPERSEDED} is no list of names, or one of them leads out of {target}")
    return names


def _check_place(target: Path, name: str) -> None:
    """Raise unless `name` can be a file inside `target`; a link may lead out of it."""
    place = target / name
    if not is_inside(name) or not place.parent.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{place} leads out of {target}")
    blocked = next((p for p in place.parents if p.is_relative_to(target) and p.exists() and not p.is_dir()), None)
    if blocked is not None or place.is_dir():
        raise ValueError(f"{blocked or place} is in the way of {place}: remove it, or save to another folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
