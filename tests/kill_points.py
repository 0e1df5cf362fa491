"""Where a hospital's daemon is killed: a place in real code at which the process sends itself SIGKILL.

Real functions are wrapped from here, in the process that is about to die; production code has no hooks.
"""

import ctypes
import functools
import importlib
import inspect
import os
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import _sqlite3

DISK = "sqlite:write"  # the target that stands for SQLite's own writes, below Python


@dataclass(frozen=True)
class Point:
    """One place to die at.

    Attributes:
        when: Before the call, or after it has returned.
        target: ``module:function`` or ``module:Class.method``; or ``DISK``.
        of: Only calls about this: a kind of entry, the first word of an SQL statement, a type of message.
        within: Only calls made while this other function runs.
        number: Which of these calls.
    """

    when: Literal["before", "after"]
    target: str
    of: str | None = None
    within: str | None = None
    number: int = 1

    def __str__(self) -> str:
        about = f" of {self.of}" if self.of else ""
        place = f" in {_short(self.within)}" if self.within else ""
        return f"{self.when} {_short(self.target)}{about} #{self.number}{place}"

    def arm(self) -> None:
        """Wrap what has to be wrapped in this process; from now on it is doomed."""
        inside = _Inside()
        if self.within is not None:
            _wrap(self.within, before=inside.enter, after=inside.leave)
        passing = _Passing(self, inside if self.within is not None else None)
        hooks = {self.when: passing}
        if self.target == DISK:
            _wrap_disk(**hooks)
        else:
            _wrap(self.target, **hooks)


class _Inside:
    """Whether a function is running."""

    depth = 0

    def enter(self, _arguments: tuple[Any, ...]) -> None:
        self.depth += 1

    def leave(self, _arguments: tuple[Any, ...]) -> None:
        self.depth -= 1


class _Passing:
    """Counts the calls that matter; the last of them is the end."""

    def __init__(self, point: Point, inside: _Inside | None) -> None:
        self._point, self._inside, self._left = point, inside, point.number

    def __call__(self, arguments: tuple[Any, ...]) -> None:
        if self._inside is not None and not self._inside.depth:
            return
        if self._point.of is not None and self._point.of not in map(_subject, arguments):
            return
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


class Connection(sqlite3.Connection):
    """SQLite's connection, but its ``execute`` can be wrapped."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        """As the real one."""
        return super().execute(*arguments)


EXECUTE = f"{__name__}:Connection.execute"

_Hook = Callable[[tuple[Any, ...]], None]


def _nothing(_arguments: tuple[Any, ...]) -> None:
    """No hook here."""


def _wrap(target: str, before: _Hook = _nothing, after: _Hook = _nothing) -> None:
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    owner: Any = functools.reduce(getattr, outer, importlib.import_module(module))
    bound = isinstance(inspect.getattr_static(owner, name), classmethod)
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        before(arguments)
        result = real(*arguments, **named)
        after(arguments)
        return result

    setattr(owner, name, staticmethod(wrapped) if bound else wrapped)
    if target == EXECUTE:
        sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)  # type: ignore[assignment]


_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
_SetCall = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_GetCall = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_SET_CALL_AT = 8 + 4 * 8 + 13 * 8  # of sqlite3_vfs: two ints and an int padded, three pointers, thirteen methods
_kept: list[Any] = []  # callbacks live as long as the process


def _wrap_disk(before: _Hook = _nothing, after: _Hook = _nothing) -> None:
    """Wrap the system call by which SQLite writes its files, through SQLite's own interface for tests of this kind."""
    library = ctypes.CDLL(_sqlite3.__file__)
    library.sqlite3_vfs_find.restype = ctypes.c_void_p
    vfs: int = library.sqlite3_vfs_find(None)
    set_call = _SetCall.from_address(vfs + _SET_CALL_AT)
    get_call = _GetCall.from_address(vfs + _SET_CALL_AT + 8)
    for name in (b"pwrite", b"pwrite64"):
        address = get_call(vfs, name)
        if address is None:
            continue
        real = _Write(address)

        def write(file: int, data: int, size: int, offset: int, real: Any = real) -> int:
            before(())
            written = int(real(file, data, size, offset))
            after(())
            return written

        _kept.append(_Write(write))
        if set_call(vfs, name, ctypes.cast(_kept[-1], ctypes.c_void_p)) != sqlite3.SQLITE_OK:
            raise OSError("SQLite does not let its writes be watched")


def _subject(argument: Any) -> str | None:
    """What a call is about, if this argument says."""
    if isinstance(argument, str):
        return argument.partition(" ")[0]
    metadata = getattr(argument, "metadata", None)
    return None if metadata is None else str(metadata.message_type)


def _short(target: str) -> str:
    return target.rpartition(":")[2]
