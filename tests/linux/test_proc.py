"""/proc as captured, and as it is here."""

import os
from pathlib import Path

import pytest

from plexd.linux import proc
from plexd.linux.proc import CpuTimes, Traffic

CAPTURED = Path(__file__).parent / "proc"


def captured(name: str) -> str:
    return (CAPTURED / name).read_text()


def test_cpu_times_are_those_of_all_processors() -> None:
    times = proc.parse_cpu_times(captured("stat"))
    assert times.total == 1132391 + 2021 + 342671 + 38131220 + 45612 + 0 + 8190 + 1204
    assert times.busy == times.total - 38131220 - 45612


@pytest.mark.parametrize(
    ("after", "percent"),
    [(CpuTimes(150, 1100), 50.0), (CpuTimes(100, 1100), 0.0), (CpuTimes(90, 1010), 0.0), (CpuTimes(200, 1050), 100.0)],
)
def test_cpu_usage_is_the_busy_part_of_the_time_between(after: CpuTimes, percent: float) -> None:
    assert proc.cpu_percent(CpuTimes(100, 1000), after) == percent


def test_no_time_between_is_no_usage() -> None:
    assert proc.cpu_percent(CpuTimes(100, 1000), CpuTimes(100, 1000)) is None


def test_load_memory_and_uptime_are_read() -> None:
    assert proc.parse_load(captured("loadavg")) == (0.42, 0.37, 1.05)
    memory = proc.parse_memory(captured("meminfo"))
    assert memory["MemTotal"] == 16250812 * 1024
    assert memory["HugePages_Total"] == 3
    assert proc.parse_uptime(captured("uptime")) == 904211.41


def test_traffic_is_that_of_the_interfaces_wanted() -> None:
    traffic = proc.parse_traffic(captured("net_dev"))
    assert traffic["eth0"] == Traffic(990018223, 412773001)
    assert proc.total_traffic(traffic, ["eth0", "gone0"], ["plexd0"]) == traffic["eth0"]


def test_without_hardware_all_but_loopback_and_our_own_count() -> None:
    traffic = proc.parse_traffic(captured("net_dev"))
    assert proc.total_traffic(traffic, [], ["plexd0"]) == Traffic(990018223 + 1000, 412773001 + 2000)


def test_program_name_with_brackets_does_not_shift_the_fields() -> None:
    assert proc.parse_threads(captured("self_stat")) == 9
    assert proc.parse_resident(captured("self_statm")) == 14012 * os.sysconf("SC_PAGE_SIZE")


def test_this_machine_can_be_read() -> None:
    assert proc.parse_cpu_times(proc.read("stat")).total > 0
    assert proc.parse_memory(proc.read("meminfo"))["MemAvailable"] > 0
    assert proc.parse_traffic(proc.read("net/dev"))
    assert proc.parse_threads(proc.read("self/stat")) >= 1
    assert proc.parse_resident(proc.read("self/statm")) > 1 << 20
    before = proc.open_files()
    with Path("/dev/null").open():
        assert proc.open_files() == before + 1
    disk = proc.disk(Path("/"))
    assert disk["disk_used_bytes"] + disk["disk_free_bytes"] <= disk["disk_total_bytes"]
