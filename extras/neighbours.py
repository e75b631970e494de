"""Advice for training on a CPU while other programs use it too.

PyTorch splits each operation over a team of threads, one per core. The threads meet when the
operation ends. By default, a thread that has finished spins while it waits for the others. If
another program holds one core, one thread is always late, and all the others burn their cores
waiting for it. So a single busy neighbour can cost far more than its share. docs/speed.md has the
figures.
"""

import multiprocessing
import os
import time

WATCH_FOR = 10.0        # seconds before the advice
OTHERS = 0.3            # advise only if other programs use at least this many cores
IDLE = 0.2              # and if at most this many are idle
CHOSEN = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def own_seconds() -> float:
    """CPU seconds of this process and its worker processes so far, from Linux's /proc."""
    ticks = 0
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            after_name = file.read().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])      # in user mode, in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> tuple[float, float]:
    """(busy, idle): CPU seconds of all cores since the machine started, from Linux's /proc."""
    with open("/proc/stat") as file:
        fields = file.readline().split()[1:9]
    user, nice, system, idle, io_wait, irq, soft_irq, steal = [int(field) for field in fields]
    busy = user + nice + system + irq + soft_irq + steal
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    return busy / ticks_per_second, (idle + io_wait) / ticks_per_second


class Neighbours:
    """Watch the machine for a while -> one line of advice if other programs slow this one down."""

    def __init__(self):
        self.is_done = any(name in os.environ for name in CHOSEN)   # the user has decided already
        self.began = time.perf_counter()
        if not self.is_done:
            self.start = self.read()

    def read(self):
        """(busy, idle, own) seconds. Zeros where there is no /proc, as on macOS."""
        try:
            return *machine_seconds(), own_seconds()
        except (OSError, ValueError, IndexError):
            self.is_done = True
            return 0.0, 0.0, 0.0

    def advice(self, out: str) -> str | None:
        """Call this after each step. The advice comes once, or never. out: the run's folder."""
        elapsed = time.perf_counter() - self.began
        if self.is_done or elapsed < WATCH_FOR:
            return None
        self.is_done = True
        busy, idle, own = [now - then for now, then in zip(self.read(), self.start)]
        others = (busy - own) / elapsed
        if others < OTHERS or idle / elapsed > IDLE:
            return None
        return (f"note     other programs use {others:.1f} of {os.cpu_count()} cores, and "
                "PyTorch's threads wait for each other; if this run is too slow, stop it with "
                "Ctrl-C and continue with OMP_WAIT_POLICY=passive python train.py --resume "
                f"--out {out}")
