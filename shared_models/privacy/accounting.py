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

_PRV_MEMORY = 2 * 2**30  # bytes; a grid that needs more would take longer than anybody waits
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


def reported_epsilon(
    mechanisms: Iterable[PoissonGaussian | GaussianRelease], delta: float, *, seconds: float = 5.0
) -> ReportedEpsilon:
    """The tight epsilon of mechanisms that were run: PRV, or RDP (and says so) where PRV takes too long or fails.

    Guarantees:
        * An upper bound if the schedule was fixed in advance, and only then.
        * Returns within ``seconds`` and the time that RDP takes, a fraction of a second for a study's few mechanisms.

    Args:
        mechanisms: Every mechanism that was charged; their order does not matter.
        delta: The delta to report at.
        seconds: How long PRV may take.

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
        epsilon, problem = _prv_within(history, delta, seconds)
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


def _prv_within(history: _History, delta: float, seconds: float) -> tuple[float | None, str]:
    """PRV in a child process that is killed at the deadline; the epsilon, or None and why there is none.

    Forked, because a fresh interpreter would import torch anew: seconds and hundreds of megabytes at every hospital.
    Should a thread of the parent hold a lock that the child needs, the deadline ends the child, and RDP answers.
    """
    _accountants()  # before the clock runs, and once for all children
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_prv_in_child, args=(history, delta, seconds, theirs), daemon=True)
    with warnings.catch_warnings():
        # From Python 3.12 on, a fork beside threads warns of the deadlock that the deadline takes care of.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return None, f"PRV took longer than {seconds:g} s"
        epsilon = float(ours.recv_bytes(64))
    except (EOFError, ValueError):
        epsilon = math.nan
    finally:
        child.kill()
        child.join()
        child.close()
        ours.close()
    return (epsilon, "") if 0 <= epsilon < math.inf else (None, "PRV failed")


def _prv_in_child(history: _History, delta: float, seconds: float, answer: Connection) -> None:
    """What the child does: compute, and write one number. It has nothing else of the parent's."""
    _let_go_of_all_but(answer.fileno(), seconds)
    accountant = _accountants().PRVAccountant()
    accountant.history = list(history)
    # At sample rate 1 Opacus's density takes log(0), which its comparisons then treat rightly as minus infinity. Any
    # other failure ends the child without an answer, and without a traceback.
    with suppress(Exception), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer.send_bytes(repr(float(accountant.get_epsilon(delta))).encode())


def _let_go_of_all_but(file: int, seconds: float) -> None:
    """Bound a forked child: no file of the parent's (above all not the ledger's lock), little memory, little time.

    The parent kills the child at the deadline; the alarm is for a child whose parent was killed first.
    """
    os.closerange(3, file)
    os.closerange(file + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _PRV_MEMORY, hard))


def _rdp(history: _History, delta: float) -> float:
    accountant = _accountants().RDPAccountant()
    accountant.history = list(history)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or last one: loose, still a bound
        return max(0.0, float(accountant.get_epsilon(delta, alphas=[*accountant.DEFAULT_ALPHAS, *_LARGE_ORDERS])))
