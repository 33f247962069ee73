"""What /proc, /sys and the file systems say about the machine and this process; parsing apart from reading."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
SYS_NET = Path("/sys/class/net")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class CpuTimes(NamedTuple):
    """Ticks since boot, of all CPUs together."""

    busy: int
    total: int


class Traffic(NamedTuple):
    rx_bytes: int
    tx_bytes: int


# parsing


def parse_cpu_times(stat: str) -> CpuTimes:
    """From /proc/stat. Guests are part of user and nice already."""
    fields = next(line for line in stat.splitlines() if line.startswith("cpu "))
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields.split()[1:9])
    total = user + nice + system + idle + iowait + irq + softirq + steal
    return CpuTimes(total - idle - iowait, total)


def cpu_percent(before: CpuTimes, after: CpuTimes) -> float | None:
    """None when no time has passed. iowait may run backwards, so the result is held between 0 and 100."""
    total = after.total - before.total
    if total <= 0:
        return None
    return min(100.0, max(0.0, 100.0 * (after.busy - before.busy) / total))


def parse_load(loadavg: str) -> tuple[float, float, float]:
    one, five, fifteen = map(float, loadavg.split()[:3])
    return one, five, fifteen


def parse_memory(meminfo: str) -> Mapping[str, int]:
    """Bytes by the kernel's names."""
    found = {}
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if number.isdecimal():
            found[name] = int(number) * (1024 if unit == "kB" else 1)
    return found


def parse_traffic(net_dev: str) -> Mapping[str, Traffic]:
    """Counters since boot by interface."""
    found = {}
    for line in net_dev.splitlines()[2:]:
        name, _, rest = line.partition(":")
        numbers = rest.split()
        if len(numbers) >= 9:
            found[name.strip()] = Traffic(int(numbers[0]), int(numbers[8]))
    return found


def parse_uptime(uptime: str) -> float:
    return float(uptime.split(maxsplit=1)[0])


def parse_resident(statm: str) -> int:
    """Bytes."""
    return int(statm.split()[1]) * _PAGE_BYTES


def parse_threads(stat: str) -> int:
    """From /proc/self/stat; the program's name in it may hold anything, also brackets and spaces."""
    return int(stat[stat.rindex(")") + 2 :].split()[17])


# reading


def read(name: str) -> str:
    """A file below /proc. Raises OSError."""
    return (PROC / name).read_text(encoding="utf-8", errors="replace")


def cpu_count() -> int:
    return os.sysconf("SC_NPROCESSORS_ONLN")


def process_times() -> float:
    """Seconds of CPU that this process has used."""
    times = os.times()
    return times.user + times.system


def open_files() -> int:
    """Of this process, without the one that looks."""
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - names only, no paths wanted


def disk(path: Path) -> Mapping[str, int]:
    """Total, used and available bytes of the file system of `path`. Raises OSError."""
    status = os.statvfs(path)
    return {
        "disk_total_bytes": status.f_blocks * status.f_frsize,
        "disk_used_bytes": (status.f_blocks - status.f_bfree) * status.f_frsize,
        "disk_free_bytes": status.f_bavail * status.f_frsize,
    }


def hardware_interfaces() -> frozenset[str]:
    """Network interfaces with a device behind them."""
    try:
        return frozenset(path.name for path in SYS_NET.iterdir() if (path / "device").exists())
    except OSError:
        return frozenset()


def total_traffic(traffic: Mapping[str, Traffic], wanted: Iterable[str], own: Iterable[str]) -> Traffic:
    """The sum over the interfaces `wanted`; over all but lo and our `own` ones when none is."""
    names = set(wanted) or {name for name in traffic if name != "lo"} - set(own)
    chosen = [counted for name, counted in traffic.items() if name in names]
    return Traffic(sum(c.rx_bytes for c in chosen), sum(c.tx_bytes for c in chosen))
