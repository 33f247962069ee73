"""What the guest is made of: Debian's stock kernel, unpacked but not installed, and an initial file system.

The kernel is cached by version under `.cache/guest`. The initial file system is packed anew for each boot: it carries
the driver for the shared root, and a copy of everything Python imports, because each look-up over 9p costs a round trip
through the emulator and the guest is an order of magnitude slower than the host to begin with.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CACHE = (REPO / ".cache" / "guest").resolve()

UNPACKED = ("boot/vmlinuz-*", "lib/modules/*/modules.*", "lib/modules/*/kernel/*/*")
NOT_UNPACKED = (
    "lib/modules/*/kernel/sound", "lib/modules/*/kernel/drivers/[!nv]*", "lib/modules/*/kernel/drivers/n[!e]*",
    "lib/modules/*/kernel/drivers/v[!i]*", "lib/modules/*/kernel/drivers/vid*",
    "lib/modules/*/kernel/drivers/net/ethernet", "lib/modules/*/kernel/drivers/net/wireless",
)  # fmt: skip
BOOT_MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay")  # what it takes to mount the shared root

# checkers and installers: large, and of no use in the guest
NOT_COPIED = (
    "mypy", "mypyc", "*__mypyc*.so", "ast_serialize", "librt", "ruff", "pip", "setuptools", "grimp", "importlinter",
)  # fmt: skip
STDLIB_NOT_COPIED = ("test", "idlelib", "tkinter", "lib2to3", "ensurepip", "config-*", "site-packages", "dist-packages")

INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
{insmod}
sh -e /mounts || {{ echo "plexd-guest: exit 125"; sleep 60; }}
exec chroot /guest /bin/sh -c {script}
"""

MOUNTS = r"""
mkdir -p /host /layer /guest
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 host /host
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /guest
mount -t proc proc /guest/proc
mount -t sysfs sys /guest/sys
mount -t cgroup2 cgroup2 /guest/sys/fs/cgroup
mount -t devtmpfs dev /guest/dev
mkdir -p /guest/dev/pts /guest/dev/shm
ln -s /proc/self/fd /guest/dev/fd
ln -s /proc/self/fd/0 /guest/dev/stdin
mount -t devpts devpts /guest/dev/pts
for directory in /dev/shm /tmp /run; do mount -t tmpfs -o mode=1777 tmpfs /guest$directory; done
chmod 755 /guest/run
mkdir -p /guest/lib/modules/{release}
mount --bind /host{modules} /guest/lib/modules/{release}
for copied in {copied}; do mkdir -p "/guest$copied" && mount --bind "$copied" "/guest$copied"; done
"""

SCRIPT = r"""
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
cd {repo}
ip link set lo up
{command}
echo "plexd-guest: exit $?"
while :; do sleep 60; done  # the emulator is stopped from outside
"""


class ImageError(Exception):
    """The guest cannot be put together; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel that boots: `kernel` is the compressed image, `modules` holds `lib/modules/<release>`."""

    release: str
    kernel: Path
    modules: Path


def kernel_image() -> Image:
    """The newest kernel that apt knows, fetched and unpacked once.

    Raises ImageError if none can be had.
    """
    package = _kernel_package()
    directory = CACHE / package
    if not directory.is_dir():
        _unpack(package, directory)
    release = next((directory / "lib/modules").iterdir()).name
    return Image(release, directory / f"boot/vmlinuz-{release}", directory / "lib/modules" / release)


def _kernel_package() -> str:
    """`linux-image-6.1.0-56-amd64=6.1.192-2`, or the newest in the cache where apt has no lists."""
    listed = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", "linux-image-amd64"], capture_output=True, text=True, check=False
    )
    found = re.search(r"^Depends: (linux-image-\S+) \(= (\S+)\)", listed.stdout, re.MULTILINE)
    if found is not None:
        return f"{found[1]}={found[2]}"
    cached = sorted(path.name for path in CACHE.glob("linux-image-*=*"))
    if cached:
        return cached[-1]
    raise ImageError("apt does not know linux-image-amd64: run apt-get update as root, or use Debian 12 on amd64")


def _unpack(package: str, directory: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="unpacking-") as scratch:
        fetch = subprocess.run(
            ["apt-get", "download", "-qq", package], cwd=scratch, capture_output=True, text=True, check=False
        )
        archive = next(Path(scratch).glob("*.deb"), None)
        if archive is None:
            raise ImageError(
                f"apt-get could not download {package} ({fetch.stderr.strip()}): try apt-get update as root"
            )
        tree = Path(scratch) / "tree"
        tree.mkdir()
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacked:
            patterns = [f"--exclude=./{pattern}" for pattern in NOT_UNPACKED]
            subprocess.run(
                ["tar", "-x", "-C", tree, "--wildcards", *patterns, *(f"./{pattern}" for pattern in UNPACKED)],
                stdin=unpacked.stdout, check=True,
            )  # fmt: skip
        for release in (tree / "lib/modules").iterdir():
            subprocess.run(["depmod", "-b", tree, release.name], check=True)
        tree.rename(directory)


def write_initramfs(image: Image, command: Sequence[str], target: Path) -> None:
    """Pack the initial file system that boots into `command`, run in the repository's directory."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    with tempfile.TemporaryDirectory() as scratch, target.open("wb") as archive:
        staging = Path(scratch)
        for name in ("bin", "dev", "proc", "modules"):
            (staging / name).mkdir()
        shutil.copy("/bin/busybox", staging / "bin/busybox")
        loads = []
        for module in dict.fromkeys(_boot_modules(image)):
            shutil.copy(module, staging / "modules")
            loads.append(f"insmod /modules/{module.name}")
        script = SCRIPT.format(repo=shlex.quote(str(REPO)), command=shlex.join(command))
        copied = shlex.join([str(REPO), str(stdlib)])
        mounts = MOUNTS.format(release=image.release, modules=shlex.quote(str(image.modules)), copied=copied)
        (staging / "mounts").write_text(mounts)
        init = staging / "init"
        init.write_text(INIT.format(insmod="\n".join(loads), script=shlex.quote(script)))
        init.chmod(0o755)
        _pack(staging, (str(path.relative_to(staging)) for path in sorted(staging.rglob("*"))), archive.fileno())
        _pack(Path("/"), _copied(stdlib), archive.fileno())


def _boot_modules(image: Image) -> Iterator[Path]:
    """In the order they must be loaded."""
    for name in BOOT_MODULES:
        listed = subprocess.run(
            ["modprobe", "--dirname", image.modules.parents[2], "--set-version", image.release, "--show-depends", name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        for line in listed.stdout.splitlines():
            word, _, path = line.strip().partition(" ")
            if word == "insmod":
                yield Path(path)


def _copied(stdlib: Path) -> Iterator[str]:
    """Paths under `/`, parents before their children: the checkout with its .venv, and Python's own library."""
    for top in (REPO, stdlib):
        yield from (str(parent)[1:] for parent in reversed(top.parents[:-1]))
    hidden = [entry.name for entry in REPO.glob(".*") if entry.name != ".venv"]
    yield from _walk(REPO, (*hidden, "build", *NOT_COPIED))
    yield from _walk(stdlib, STDLIB_NOT_COPIED)


def _walk(top: Path, left_out: Sequence[str]) -> Iterator[str]:
    def kept(names: list[str]) -> list[str]:
        return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out)]

    for directory, directories, files in os.walk(top):
        directories[:] = kept(directories)
        yield directory[1:]
        yield from (f"{directory}/{name}"[1:] for name in kept(files))
        yield from (f"{directory}/{name}"[1:] for name in directories if Path(directory, name).is_symlink())


def _pack(base: Path, names: Iterator[str], archive: int) -> None:
    listed = "".join(f"{name}\0" for name in dict.fromkeys(names))
    subprocess.run(
        ["cpio", "--create", "--format=newc", "--null", "--quiet"],
        cwd=base, input=listed.encode(), stdout=archive, check=True,
    )  # fmt: skip
