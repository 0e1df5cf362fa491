"""Freed memory is kept for the next step, and handed back after the last."""

import subprocess
import sys

_PROGRAM = """
import ctypes, resource, sys
import torch
from client.memory import freed_memory_kept

if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit(77)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

outside = max(faults() for _ in range(4))
with freed_memory_kept():
    inside = [faults() for _ in range(20)][-1]
    kept = resident()
print(outside, inside, kept - resident())
"""


def test_what_is_freed_inside_is_there_for_the_next_step_and_is_handed_back_at_the_end() -> None:
    """16 MB cost a fault for each page outside, none inside; at the end they are the kernel's again."""
    # given: a process of its own, because the thresholds are the whole process's, and a few rounds, until an aligned
    # block that was freed fits the next
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)

    # then: where the C library has no such thresholds, there is nothing to keep
    if done.returncode != 77:
        outside, inside, handed_back = map(int, done.stdout.split())
        assert outside > 3000
        assert inside < 300
        assert handed_back > 3000
