"""Boot an emulated machine whose PID 1 is Debian's systemd, and run the tests that need it there.

`python -m tests.vm_systemd [pytest arguments]` boots, like tests/vm.py, Debian's own kernel under QEMU with this host's
file system underneath (read-only), on pure cgroup v2. But the kernel starts /lib/systemd/systemd. systemd finds only
the units that this module installs: the system's bus, the dependencies of units, managers of users, and a service that
runs pytest, in a cgroup that is not delegated, and ends the machine. Other units that this host starts at boot are not
started.

In the machine the tests find `RCON_TEST_INIT=systemd`, which selects the tests marked `init("systemd")`; a loopback
network; `TMPDIR`, the whole of /tmp and /run on a tmpfs; one CPU and 1 GiB of memory.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from shlex import quote

from tests.machine import (
    PATH,
    PLUGINS,
    ROOT,
    compile_sources,
    end_on_signals,
    fail,
    machine,
    newest_kernel,
    run,
    selects_tests,
)

TESTS = "tests/kernel/systemd"
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = SYSTEMD.parent / "system"
#: The only directory in the machine where systemd looks for units.
UNIT_PATH = Path("/run/systemd/system")
#: The units of the system that the tests' units need. They start no other units.
OF_THE_SYSTEM = (
    *("basic.target", "sysinit.target", "shutdown.target", "sockets.target", "umount.target", "final.target"),
    *("slices.target", "user.slice", "user@.service", "user-runtime-dir@.service"),
    *("dbus.service", "dbus.socket"),
)
SERVICE = """\
[Unit]
Description=the tests
DefaultDependencies=no
Requires=dbus.socket
After=dbus.socket
[Service]
Type=exec
WorkingDirectory={root}
StandardInput=null
StandardOutput=file:/dev/ttyS0
StandardError=inherit
Environment={environment}
ExecStart={command}
ExecStopPost=/bin/sh -c 'echo $EXIT_STATUS >/dev/ttyS1; sleep 0.1; echo o >/proc/sysrq-trigger'
"""
#: A longer timeout, because everything takes longer in an emulated machine.
MANAGER = "[Manager]\nDefaultTimeoutStartSec=280s\nDefaultTimeoutStopSec=280s\n"
#: Settings that PAM and logind make on other machines. The manager of a user needs neither of the two.
USER_MANAGER = "[Service]\nPAMName=\nEnvironment=XDG_RUNTIME_DIR=/run/user/%i\n"
#: The bus of a user's session, as in the package dbus-user-session.
USER_BUS = {
    "dbus.socket": "[Socket]\nListenStream=%t/bus\n",
    "dbus.service": "[Unit]\nRequires=dbus.socket\n[Service]\nType=notify\n"
    "ExecStart=/usr/bin/dbus-daemon --session --address=systemd: --nofork --nopidfile --systemd-activation\n",
}


def beginning(prepared: Path) -> str:
    """Return the sh script that PID 1 runs before systemd. The file system below is read-only, with the host's /tmp.

    The directories above the project and its Python may be open to root alone. Services of ordinary users must be able
    to pass through them, but through no other private directories.
    """
    lines = [
        "set -e",
        f"export PATH={PATH} SYSTEMD_UNIT_PATH={UNIT_PATH}",
        "mount -t tmpfs -o mode=755 run /run",
        f"cp -r {quote(str(prepared))} /run/systemd",
    ]
    covered = {Path("/tmp"): 0o1777}
    shown: list[tuple[str, Path]] = []
    for wanted in (ROOT, Path(sys.base_prefix)):
        above = list(reversed(wanted.parents))[1:]
        private = next((one for one in above if not one.stat().st_mode & 0o001), None)
        if private is not None and not any(private.is_relative_to(one) for one in covered):
            covered[private] = 0o755
        if any(one in covered for one in above):
            place = f"/run/shown-{len(shown)}"
            shown.append((place, wanted))
            lines += [f"mkdir {place}", f"mount --bind {quote(str(wanted))} {place}"]
    lines += [f"mount -t tmpfs -o mode={mode:o} tmp {quote(str(one))}" for one, mode in covered.items()]
    for place, wanted in shown:
        lines += [f"mkdir -p {quote(str(wanted))}", f"mount --move {place} {quote(str(wanted))}"]
    lines += [f"exec {SYSTEMD} --log-level=warning --show-status=no --unit=tests.service"]
    return "\n".join([*lines, ""])


def prepare(directory: Path, arguments: list[str]) -> None:
    """Make the directory that becomes /run/systemd in the machine."""
    units = directory / "system"
    for name in ("system/user@.service.d", "user/sockets.target.wants", "system.conf.d", "user.conf.d"):
        directory.joinpath(name).mkdir(parents=True)
    for name in OF_THE_SYSTEM:
        if not UNITS.joinpath(name).exists():
            fail(f"{UNITS / name} is missing. As root: apt-get install systemd dbus")
        units.joinpath(name).symlink_to(UNITS / name)
    units.joinpath("user@.service.d/tests.conf").write_text(USER_MANAGER)
    for name in ("system.conf.d", "user.conf.d"):
        directory.joinpath(name, "tests.conf").write_text(MANAGER)
    for name, text in USER_BUS.items():
        directory.joinpath("user", name).write_text(text)
    directory.joinpath("user/sockets.target.wants/dbus.socket").symlink_to("../dbus.socket")
    environment = {
        "RCON_TEST_INIT": "systemd",
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
        **{name: os.environ[name] for name in ("CI",) if name in os.environ},
    }
    options = ["--color=no", *PLUGINS, "-p", "no:cacheprovider", "-o", "timeout=300"]
    options += ["--basetemp", "/tmp/pytest"]
    units.joinpath("tests.service").write_text(
        SERVICE.format(
            root=ROOT,
            environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
            command=shlex.join([sys.executable, "-m", "pytest", *options, *arguments]),
        )
    )


def boot(arguments: list[str], *, timeout: int, memory: str) -> int:
    """Boot, run pytest in the machine, and return its exit status."""
    kernel = newest_kernel()
    print(f"Booting {kernel.name} with systemd as PID 1 in an emulated machine (about 20 s) ...", flush=True)
    compile_sources([TESTS])

    def command(scratch: Path) -> list[str]:
        prepared = scratch / "systemd"
        prepare(prepared, arguments)
        # The tests are about no CPU of their own, and a second one makes each instruction dearer to emulate.
        return machine(kernel, scratch, memory, beginning(prepared), cpus=1)

    return run(command, timeout)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run tests in a machine that systemd has booted.")
    parser.add_argument(
        "--timeout", type=int, default=1200, help="seconds for all of it (default: %(default)s)"
    )
    parser.add_argument("--memory", default="1G", help="memory of the machine (default: %(default)s)")
    options, arguments = parser.parse_known_args()
    arguments = [a for a in arguments if a != "--"]
    if not selects_tests(arguments):
        arguments = [TESTS, "-m", "init", "--reruns", "1", *arguments]
    end_on_signals()
    try:
        return boot(arguments, timeout=options.timeout, memory=options.memory)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
