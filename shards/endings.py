"""How a child ended, and whether what it ran is to blame. Pure but for one counter of the kernel's."""

from __future__ import annotations

import signal
from pathlib import Path

EXIT_FAILED = 1
EXIT_CANNOT_BOOT = 3
EXIT_HUNG = 4
EXIT_BROKEN = 5

# What a process does to itself. SIGKILL, SIGTERM and their like come from outside; a hang is ended by us and says so.
FAULTS = {
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSYS,
    signal.SIGTRAP,
    signal.SIGXCPU,
}


def told(code: int | None) -> str:
    """An exit code for people."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def is_of_its_own(code: int | None, *, was_hanging: bool, was_out_of_memory: bool) -> bool:
    """Whether a child that ended with ``code`` died of what it ran.

    Not if somebody ended it from outside, and not if it ended because of the database. The kernel ends processes with SIGKILL
    too when memory runs out: ``was_out_of_memory`` says that it has done so lately.
    """
    if was_hanging:
        return True
    if code is None or code in (EXIT_BROKEN, EXIT_CANNOT_BOOT):
        return False
    if code >= 0:
        return True
    return -code in FAULTS or (code == -signal.SIGKILL and was_out_of_memory)


def out_of_memory_kills() -> int:
    """How many processes the kernel has ended since it booted because memory ran out; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
