"""The epsilon that is reported: tight, by Opacus's accountants. It enforces nothing: ``mechanisms.py`` has the filter.

The only shared file that imports Opacus, and of Opacus only the accountants. Its engine is never asked for an epsilon;
its accountants are handed the mechanisms that the ledger recorded.
"""

import importlib
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from shared_models.config import Frozen
from shared_models.errors import ConfigError
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian, total_divergence

_History = list[tuple[float, float, int]]  # (noise multiplier, sample rate, times), as Opacus's accountants keep it

# PRV figures that this process has computed: asked again, they take no second. Failures are not kept.
_known: dict[tuple[tuple[tuple[float, float, int], ...], float], float] = {}
_MOST_KNOWN = 1000

# How much PRV may compute is counted in points of its grid, not in seconds: the same question has the same answer, by
# the same accountant, however busy the machine is. So many take some 5 s of a processor and 1 GB.
_MOST_POINTS, _MOST_MECHANISMS = 8_000_000, 200
_PRV_MEMORY = 2 * 2**30  # bytes
_STILL_S = 15.0  # a child that computes nothing for so long waits for a lock that nobody gives back
_LONGEST_S = 600.0  # for a child whose parent was killed
_TOO_LARGE = b"too large"
# At order 2. Beyond it epsilon means nothing, and Opacus's series for orders between integers stop converging.
_LARGEST_DIVERGENCE = 1e6
_LARGE_ORDERS = (64, 128, 256, 512, 1024)  # beyond Opacus's own: for little-noised or rarely sampled runs
_OPACUS = version("opacus")


class ReportedEpsilon(Frozen):
    """An epsilon, never without what it holds at, for whom, and who computed it."""

    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["patient"] = "patient"
    neighbouring: Literal["add or remove one patient"] = "add or remove one patient"
    accountant: str
    note: Literal["for the schedule as executed, valid if it was fixed in advance"] = (
        "for the schedule as executed, valid if it was fixed in advance"
    )


def reported_epsilon(mechanisms: Iterable[PoissonGaussian | GaussianRelease], delta: float) -> ReportedEpsilon:
    """The tight epsilon of mechanisms that were run: PRV, or RDP (and says so) where PRV's grid is too large or fails.

    Guarantees:
        * An upper bound if the schedule was fixed in advance, and only then.
        * Which accountant answers depends on the mechanisms and ``delta`` alone, not on how busy the machine is.

    Args:
        mechanisms: Every mechanism that was charged; their order does not matter.
        delta: The delta to report at.

    Raises:
        ConfigError: ``delta`` is not between 0 and 1, or the noise is too small for any finite epsilon.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, not {delta:g}", hint="At most 1 / (10 * public size).")
    mechanisms = list(mechanisms)
    history = _history(mechanisms)
    prv = f"PRV (Opacus {_OPACUS})"
    if not total_divergence(mechanisms, 2) < _LARGEST_DIVERGENCE:
        raise ConfigError("no finite epsilon describes these mechanisms", hint="Their noise multiplier is too small.")
    if not history:
        return ReportedEpsilon(epsilon=0.0, delta=delta, accountant=prv)
    key, problem = (tuple(history), delta), ""
    epsilon = _known.get(key)
    if epsilon is None:
        epsilon, problem = _prv(history, delta)
    if epsilon is not None:
        if len(_known) < _MOST_KNOWN:
            _known[key] = epsilon
        return ReportedEpsilon(epsilon=epsilon, delta=delta, accountant=prv)
    rdp = f"RDP (Opacus {_OPACUS}); {problem}"
    return ReportedEpsilon(epsilon=_rdp(history, delta), delta=delta, accountant=rdp)


@cache
def _accountants() -> Any:
    """Opacus's accountants without the rest of Opacus.

    ``import opacus.accountants`` runs Opacus's own ``__init__`` first, which imports engine, optimizers and torch's
    distributed tensors: with torch two seconds and 200 MB, for a command that shows a budget as for every hospital that
    trains. The accountants need numpy and scipy. Of the rest they name one class, in the annotation of a method that is
    not called here. So two empty packages stand in while they are imported, and are gone afterwards: whoever imports
    Opacus later gets all of it.
    """
    if "opacus" in sys.modules:
        return importlib.import_module("opacus.accountants")
    found = find_spec("opacus")
    package, optimizers = ModuleType("opacus"), ModuleType("opacus.optimizers")
    package.__path__ = list(found.submodule_search_locations or ()) if found else []
    optimizers.__dict__["DPOptimizer"] = object
    sys.modules |= {"opacus": package, "opacus.optimizers": optimizers}
    try:
        return importlib.import_module("opacus.accountants")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "opacus"]:
            del sys.modules[name]


def _history(mechanisms: Iterable[PoissonGaussian | GaussianRelease]) -> _History:
    """Equal steps grouped: PRV's cost grows with the number of different ones, not with their count."""
    counts: Counter[tuple[float, float]] = Counter()
    for mechanism, times in Counter(mechanisms).items():
        if isinstance(mechanism, PoissonGaussian):
            counts[mechanism.noise_multiplier, mechanism.sample_rate] += mechanism.steps * times
        else:
            counts[mechanism.noise_multiplier, 1.0] += mechanism.releases * times
    return [(sigma, q, times) for (sigma, q), times in sorted(counts.items())]


def _prv(history: _History, delta: float) -> tuple[float | None, str]:
    """PRV in a child process; the epsilon, or None and why there is none.

    Forked, because a fresh interpreter would import torch anew: seconds and hundreds of megabytes at every hospital.
    Should a thread of the parent hold a lock that the child needs, the child computes nothing and is ended, and RDP
    answers.
    """
    if len(history) > _MOST_MECHANISMS:
        return None, f"PRV is not for more than {_MOST_MECHANISMS} different mechanisms"
    _accountants()  # once for all children
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_prv_in_child, args=(history, delta, theirs), daemon=True)
    with warnings.catch_warnings():
        # From Python 3.12 on, a fork beside threads warns of the deadlock that is taken care of below.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    theirs.close()
    try:
        if not _answered(ours, child.pid or 0):
            return None, "PRV stood still"
        answer = ours.recv_bytes(64)
        epsilon = math.nan if answer == _TOO_LARGE else float(answer)
    except (EOFError, OSError, ValueError):
        answer, epsilon = b"", math.nan
    finally:
        child.kill()
        child.join()
        child.close()
        ours.close()
    if answer == _TOO_LARGE:
        return None, f"PRV would need a grid of more than {_MOST_POINTS} points"
    return (epsilon, "") if 0 <= epsilon < math.inf else (None, "PRV failed")


def _answered(answer: Connection, pid: int) -> bool:
    """Wait for as long as the child computes; whether it answered, or ended."""
    ticks, since = -1, time.monotonic()
    while not answer.poll(min(1.0, _STILL_S)):
        before, ticks = ticks, _ticks(pid)
        if ticks != before:
            since = time.monotonic()
        elif time.monotonic() - since > _STILL_S:
            return False
    return True


def _ticks(pid: int) -> int:
    """Processor time that a child has had, in clock ticks: fields 14 and 15 of proc(5), behind the command's name."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _prv_in_child(history: _History, delta: float, answer: Connection) -> None:
    """What the child does: compute, and write one number. It has nothing else of the parent's."""
    _let_go_of_all_but(answer.fileno())

    class Bounded(_accountants().PRVAccountant):  # type: ignore[misc]  # Opacus has no types
        """Opacus's, which stops before it computes on a grid that is too large."""

        def _get_domain(self, **options: Any) -> Any:
            domain = super()._get_domain(**options)
            if domain.size * len(self.history) > _MOST_POINTS:
                raise _TooLargeError
            return domain

    accountant = Bounded()
    accountant.history = list(history)
    # At sample rate 1 Opacus's density takes log(0), which its comparisons then treat rightly as minus infinity. Any
    # other failure ends the child without an answer, and without a traceback.
    with suppress(Exception), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            answer.send_bytes(repr(float(accountant.get_epsilon(delta))).encode())
        except _TooLargeError:
            answer.send_bytes(_TOO_LARGE)


class _TooLargeError(Exception):
    """A grid has too many points."""


def _let_go_of_all_but(file: int) -> None:
    """Bound a forked child: no file of the parent's (above all not the ledger's lock), little memory, and an end.

    The parent ends the child; the alarm is for a child whose parent was killed first.
    """
    os.closerange(3, file)
    os.closerange(file + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST_S)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _PRV_MEMORY, hard))


def _rdp(history: _History, delta: float) -> float:
    accountant = _accountants().RDPAccountant()
    accountant.history = list(history)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or last one: loose, still a bound
        return max(0.0, float(accountant.get_epsilon(delta, alphas=[*accountant.DEFAULT_ALPHAS, *_LARGE_ORDERS])))
