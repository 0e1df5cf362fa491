"""Programs that are not Konsil's and not Python's: used where they are, said to be missing where not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def tool(name: str, *, where: str) -> str:
    """Path of a program, beside this Python or on the PATH. Where there is none the test is skipped, and says so."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({where})")
    return found


def said(*command: str | Path, status: int = 0, cwd: Path = ROOT, text: str | None = None) -> str:
    """What a program said on both streams, once it has ended with the status that is expected."""
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, input=text, check=False, timeout=120)
    output = found.stdout + found.stderr
    assert found.returncode == status, output
    return output
