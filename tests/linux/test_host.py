from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from plexd.linux import host


def test_architecture_is_spelled_as_in_registrations() -> None:
    assert host.architecture() in {"amd64", "arm64"}


def test_package_checksum_is_that_of_the_sorted_lines(tmp_path: Path) -> None:
    for name, content in {"b.py": b"b", "a/z.py": b"z", "a.py": b"", "__pycache__/b.cpython-311.pyc": b"code"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    lines = "".join(
        f"{name} {hashlib.sha256(content).hexdigest()}\n"
        for name, content in (("a.py", b""), ("a/z.py", b"z"), ("b.py", b"b"))
    )
    assert host.package_checksum(tmp_path) == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def test_program_checksum_is_that_of_this_package() -> None:
    package = Path(host.__file__).parent.parent
    assert host.program_checksum() == host.package_checksum(package)


def test_program_checksum_of_a_zip_application_is_that_of_the_file(tmp_path: Path) -> None:
    package = Path(host.__file__).parent.parent
    archive = Path(shutil.make_archive(str(tmp_path / "plexd"), "zip", package.parent, package.name))
    program = "from plexd.linux import host; print(host.program_checksum())"
    said = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": str(archive)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert said == f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}\n"


def test_prepared_process_keeps_its_files_and_memory_to_itself() -> None:
    program = """
import ctypes, os, resource
from plexd.linux import host
host.prepare_process()
subreaper = ctypes.c_int()
ctypes.CDLL(None).prctl(37, ctypes.byref(subreaper), 0, 0, 0)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print(os.umask(0), resource.getrlimit(resource.RLIMIT_CORE), soft == min(hard, 65536), subreaper.value, os.getcwd())
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said == f"{0o077} (0, 0) True 1 {os.sep}\n0\n"


def test_memory_that_a_prepared_process_is_done_with_goes_back_to_the_system() -> None:
    """Also after a large block was freed, from which glibc concludes to keep such memory, and with others behind it."""
    program = """
from pathlib import Path
from plexd.linux import host
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) >> 8  # MiB
host.prepare_process()
bytes(8 << 20)
before, behind = resident(), []
blocks = [bytearray(1 << 20) for _ in range(64) if behind.append(bytearray(4096)) is None]
during = resident()
del blocks
print(during - before >= 64, resident() - before < 8)
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said == "True True\n"
