"""extras/neighbours.py: advice while other programs use the CPU."""

import os

import pytest

from extras import neighbours


@pytest.fixture
def watch(monkeypatch):
    """watch(busy, idle, own) -> the advice after 20 seconds in which two cores did that."""
    for name in neighbours.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def advice(busy, idle, own, seconds=20.0):
        machine = iter([(1000.0, 500.0), (1000.0 + busy, 500.0 + idle)])
        process = iter([30.0, 30.0 + own])
        monkeypatch.setattr(neighbours, "machine_seconds", lambda: next(machine))
        monkeypatch.setattr(neighbours, "own_seconds", lambda: next(process))
        watcher = neighbours.Neighbours()
        watcher.began -= seconds
        found = watcher.advice("out")
        assert watcher.advice("out") is None        # never twice
        return found

    return advice


def test_a_neighbour_that_holds_a_core_is_named(watch):
    advice = watch(busy=40, idle=0, own=20)
    assert "other programs use 1.0 of 2 cores" in advice
    assert advice.endswith("python train.py --resume --out out")


@pytest.mark.parametrize("seconds", [
    {"busy": 40, "idle": 0, "own": 39},             # alone
    {"busy": 30, "idle": 10, "own": 20},            # a neighbour, but the cores are not all taken
    {"busy": 1, "idle": 0, "own": 0.2, "seconds": 1.0},         # too early to tell
])
def test_no_advice_without_reason(watch, seconds):
    assert watch(**seconds) is None


def test_who_has_chosen_a_policy_gets_no_advice(watch, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert watch(busy=40, idle=0, own=20) is None


def test_no_advice_where_the_system_does_not_count(monkeypatch):
    def missing():
        raise FileNotFoundError("/proc/stat")

    for name in neighbours.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(neighbours, "machine_seconds", missing)
    watcher = neighbours.Neighbours()
    watcher.began -= 20
    assert watcher.advice("out") is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux counts in /proc")
def test_the_counters_of_linux_only_grow():
    """The idle seconds are not compared: they include the wait for disks, which may decrease."""
    busy, idle = neighbours.machine_seconds()
    own = neighbours.own_seconds()
    assert busy > 0 and idle >= 0 and own > 0
    sum(range(10**6))
    assert neighbours.machine_seconds()[0] >= busy
    assert neighbours.own_seconds() >= own
