"""The demo as a newcomer runs it, several times: seconds, memory, AUROC and epsilon of the default study.

Each run is ``konsil-coordinator demo``: a coordinator and four hospitals as processes over TLS, live measuring, the
study, and the baselines. Noise comes from the operating system, so every run is another draw.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from server.processes import find_command
from shared_models.errors import FederationError

SECONDS, MEMORY_MB, AUROC, EPSILON = 90.0, 2000.0, 0.985, 1.0  # the targets
END_S = 30.0  # the demo gives its own children five seconds


def run_demo(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the demo in a process of its own and return its report; however this ends, the demo has ended too.

    Raises:
        FederationError: It failed; the message is the demo's own.
    """
    report = folder.with_suffix(".json")
    command = [find_command("konsil-coordinator"), "demo", "--folder", str(folder), "--json", str(report), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        process.wait(timeout=END_S)
        raise
    if process.returncode:
        said = [line for line in output.splitlines() if line.startswith(("error: ", "hint: "))]
        raise FederationError(" ".join(said) or f"the demo ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that goes away, and a SIGTERM that unwinds like Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="konsil-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def highest(report: dict[str, Any], figure: str) -> float:
    """The largest value of a figure over the hospitals of one report."""
    return float(max(hospital[figure] for hospital in report["hospitals"].values()))


def verdict(met: bool) -> str:
    """How a target is reported."""
    return "met" if met else "MISSED"


def summarise(reports: list[dict[str, Any]]) -> dict[str, float]:
    """The figures over all runs; the worst one wherever the target is a limit for every run."""
    aurocs = [report["metrics"]["auroc"] for report in reports]
    return {
        "demo_runs": len(reports),
        "demo_rounds": min(report["rounds_completed"] for report in reports),
        "demo_seconds": median(report["seconds"] for report in reports),
        "demo_seconds_max": max(report["seconds"] for report in reports),
        "demo_peak_memory_mb": max(report["peak_memory_mb"] for report in reports),
        "demo_auroc": median(aurocs),
        "demo_auroc_min": min(aurocs),
        "demo_epsilon_max": max(highest(report, "epsilon") for report in reports),
        "demo_epsilon_filter_max": max(highest(report, "epsilon_filter") for report in reports),
    }


def print_summary(figures: dict[str, float]) -> None:
    """The figures beside their targets."""
    seconds, memory = figures["demo_seconds"], figures["demo_peak_memory_mb"]
    auroc, epsilon = figures["demo_auroc_min"], figures["demo_epsilon_filter_max"]
    print(f"seconds, median      {seconds:8.1f}   target <= {SECONDS:g}: {verdict(seconds <= SECONDS)}")
    print(f"peak memory, highest {memory:8.0f}   target <= {MEMORY_MB:g} MB: {verdict(memory <= MEMORY_MB)}")
    print(
        f"AUROC, lowest        {auroc:8.3f}   target >= {AUROC:g}: {verdict(auroc >= AUROC)}; "
        f"median {figures['demo_auroc']:.3f}"
    )
    print(
        f"epsilon, highest     {epsilon:8.3f}   target <= {EPSILON:g}: {verdict(epsilon <= EPSILON)} (enforced); "
        f"reported {figures['demo_epsilon_max']:.3f}"
    )


def main() -> None:
    """Run, print, and say which targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="how often (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    reports = []
    with scratch_folder() as folder:
        for number in range(1, options.runs + 1):
            try:
                report = run_demo(folder / f"run-{number}")
            except FederationError as error:
                sys.exit(f"error: {error}")
            reports.append(report)
            print(
                f"run {number}: {report['seconds']:5.1f} s, {report['peak_memory_mb']:5.0f} MB, AUROC "
                f"{report['metrics']['auroc']:.3f}, accuracy {report['metrics']['accuracy']:.3f}, epsilon "
                f"{highest(report, 'epsilon'):.3f} (load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    figures = summarise(reports)
    print_summary(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
