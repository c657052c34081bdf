"""A container with a shell on pure v2: its processes are in the root of its cgroup namespace, and move into a leaf.

The containers here have a cgroup namespace and a mount namespace of their own, with cgroup2 mounted anew. Their limits
are those of a cgroup of the test.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree import container_root
from tests.kernel.cgroup.helpers import running, sleep_forever

pytestmark = pytest.mark.layout("v2")

CGROUPS = Path("/sys/fs/cgroup")
RCON = shlex.join([str(Path(sys.executable).parent / "rcon")])
#: What a container sees of itself: its own cgroup, and the processes in the root.
MOUNT = "umount -l /sys/fs/cgroup; mount -t cgroup2 cgroup /sys/fs/cgroup"
LOOK = "cat /proc/self/cgroup; echo root: $(cat /sys/fs/cgroup/cgroup.procs)"


@pytest.fixture
def container(base: Cgroup) -> Cgroup:
    """The cgroup that an engine makes for a container, which gets controllers and has limits."""
    made = base.child("container").create()
    made.configure(Resources(memory_max=512 << 20, pids_max=200))
    return made


def in_container(container: Cgroup, script: str, *unshare: str) -> subprocess.CompletedProcess[str]:
    """Run a shell in a container, whose root it is in itself."""
    inside = f"{MOUNT}; {script}"
    outside = (
        f"echo $$ > {container.directories[0]}/cgroup.procs; "
        f"exec unshare --cgroup --mount --propagation private {shlex.join(unshare)} sh -c {shlex.quote(inside)}"
    )
    return subprocess.run(["sh", "-c", outside], capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.smoke
def test_a_command_runs_beside_a_shell(container: Cgroup) -> None:
    """The shell is moved, too. A second command finds the root empty. Afterwards nothing of rcon's is left."""
    limits = f"{RCON} run --memory 50M -- sh -c 'cat /sys/fs/cgroup/$(cut -d: -f3 /proc/self/cgroup)/../memory.max'"
    done = in_container(container, f"sleep 60 & {limits}; {limits}; {LOOK}; ls -d /sys/fs/cgroup/*/; kill $!")
    assert (done.returncode, done.stderr) == (0, ""), done
    *limit, own, root, left = done.stdout.split("\n")[:5]
    assert limit == [str(50 << 20)] * 2
    assert (own, root, left) == ("0::/init", "root:", "/sys/fs/cgroup/init/")
    # The limits of the container hold for what was moved.
    assert container.children() == ["init"]
    assert (CGROUPS / container.path[1:] / "cgroup.procs").read_text() == ""


def test_the_processes_stay_within_the_limits_of_the_container(container: Cgroup) -> None:
    done = in_container(
        container, f"{RCON} run --memory 50M -- true; dd if=/dev/zero of=/dev/null bs=600M count=1"
    )
    assert done.returncode == 137
    assert container.read().oom_kills


def test_a_server_starts_beside_a_shell(container: Cgroup) -> None:
    code = (
        "from rcon_plugins import Manager; from rcon_plugins.settings.file import from_mapping;"
        "from rcon_plugins.confinement.isolation import Server;"
        "m = Manager(from_mapping({'policy': {'p': {'memory': '64M', 'isolation': 'process'}},"
        " 'route': [{'policy': 'p'}]}), server=Server(threads=False)).start(lambda *_: None);"
        "m.close()"
    )
    done = in_container(container, f"{shlex.join([sys.executable, '-c', code])}; {LOOK}")
    assert "Error" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-2:] == ["0::/init", "root:"]


def test_what_only_looks_moves_nothing_and_says_what_a_start_does(container: Cgroup) -> None:
    """Afterwards no cgroup is there. Once a command has made room, doctor tries everything."""
    look = "echo $$ in: $(cat /sys/fs/cgroup/cgroup.procs), cgroups: $(ls -d /sys/fs/cgroup/*/ 2>&1)"
    check = "printf '[policy.web]\nmemory = \"64M\"\n' > $TMPDIR/rcon-look.toml; "
    check += f"{RCON} check --json $TMPDIR/rcon-look.toml"
    script = f"{RCON} doctor; {look}; {check}; {look}; {RCON} run --memory 50M -- true; {RCON} doctor; {look}"
    done = in_container(container, script)
    assert done.stderr == "", done.stderr
    doctor, checked, again = (part.splitlines() for part in done.stdout.split(" in: ")[:3])
    for lines in (doctor, again[:-1]):
        assert "NO" not in [line.split()[0] for line in lines if line.strip()], lines
        assert "every limit can be set here, below the cgroup /rcon" in lines
    announcement = "a start first moves the processes of this container to the cgroup /init"
    assert announcement in " ".join(" ".join(doctor).split())
    assert announcement in " ".join(" ".join(checked).split())
    assert '"cgroup": "/rcon"' in "".join(checked)
    untried = "not tried: processes of this container would have to move"
    assert announcement not in " ".join(" ".join(again).split())
    assert [untried in "".join(lines) for lines in (doctor, again)] == [True, False]
    seen = [line for line in done.stdout.splitlines() if " in: " in line]
    for line in seen[:2]:
        shell, _, processes = line.partition(" in: ")
        inside, _, cgroups = processes.partition(", cgroups: ")
        assert shell in inside.split(), seen
        assert "No such file" in cgroups
    assert seen[2].endswith(" in: , cgroups: /sys/fs/cgroup/init/")


def test_a_process_of_another_cgroup_namespace_is_not_moved(container: Cgroup) -> None:
    """As where a service manager outside put it there. The message has the commands, and they work."""
    with running(container, sleep_forever) as outsider:
        done = in_container(container, f"{RCON} run --memory 50M -- echo ran; {LOOK}")
        assert "ran" not in done.stdout
        assert str(outsider.pid) in done.stdout.splitlines()[-1].split()
        assert (
            f"process {outsider.pid} is not known to be in the cgroup namespace of this process"
            in done.stderr
        )
        assert done.stderr.count("\n") == 1
        commands = done.stderr.partition("; run as root: ")[2].strip().removesuffix(")").split("; ")
        assert len(commands) == 3
        by_hand = "\n".join(commands)
        done = in_container(container, f"{by_hand}\n{RCON} run --memory 50M -- echo ran")
        assert "ran" in done.stdout, done
        assert outsider.pid in container.child("init").processes()


def test_a_process_that_cannot_be_seen_is_not_moved(container: Cgroup) -> None:
    """In a PID namespace, processes outside of it have no number."""
    with running(container, sleep_forever) as outsider:
        options = ("--pid", "--fork", "--kill-child", "--mount-proc")
        done = in_container(container, f"{RCON} run --memory 50M -- echo ran; {LOOK}", *options)
        assert "ran" not in done.stdout
        assert (
            "some of them are in a PID namespace that cannot be seen from here; run as root: " in done.stderr
        )
        assert outsider.pid in container.processes()


def test_a_container_with_a_pid_namespace(container: Cgroup) -> None:
    """The process that waits for the container outside of it is not in its cgroup."""
    options = ("--pid", "--fork", "--kill-child", "--mount-proc")
    inside = f"{MOUNT}; {RCON} run --memory 50M -- echo ran; {LOOK}"
    # The process that unshare forks joins the cgroup before it makes its cgroup namespace.
    joins = f"echo $$ > {container.directories[0]}/cgroup.procs"
    enters = f"exec unshare --cgroup --mount --propagation private sh -c {shlex.quote(inside)}"
    done = subprocess.run(
        ["unshare", *options, "sh", "-c", f"{joins}; {enters}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.splitlines() == ["ran", "0::/init", "root:"], done


def test_the_root_of_the_machine_is_left_alone() -> None:
    """It has no cgroup.type, and passes controllers on whatever is in it."""
    hierarchy = Hierarchy.discover()
    assert not (CGROUPS / "cgroup.type").exists()
    assert not container_root.is_busy(hierarchy)
    assert container_root.empty(hierarchy) == []
    assert not (CGROUPS / "init").exists()


def test_it_gives_up_and_moves_all_back_where_processes_fork_too_fast(container: Cgroup) -> None:
    code = (
        "import os, sys\n"
        "from rcon_plugins.kernel.cgroup import Hierarchy\n"
        "from rcon_plugins.tree import container_root\n"
        "container_root._ROUNDS = 0\n"
        "try: container_root.empty(Hierarchy.discover())\n"
        "except OSError as error: print(error.errno, os.path.isdir('/sys/fs/cgroup/init'))\n"
        "os.seteuid(65534)\n"
        "print(container_root.why_not(Hierarchy.discover()))\n"
    )
    began = time.monotonic()
    done = in_container(container, shlex.join([sys.executable, "-c", code]))
    assert done.stdout == "16 False\nonly root may move them\n", done
    assert time.monotonic() - began < 60
