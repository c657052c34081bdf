"""Request a transient scope with ``Delegate=yes`` from systemd over D-Bus, and move this process into it.

For an ordinary user, the request goes to the user's own manager (``systemd --user``); for root, to the system manager.
It needs jeepney (the extra ``systemd``), which is imported only for a request. Source:
https://systemd.io/CGROUP_DELEGATION, org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Any

from rcon_plugins.errors import DelegationError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.mounts import is_systemds, parse_membership

if TYPE_CHECKING:
    from jeepney import Message
    from jeepney.io.blocking import DBusConnection

#: The timeout of the whole request: connecting, asking, and moving this process. A booting machine is slow to answer.
TIMEOUT_SECONDS = 30.0
_SYSTEM_BUS = "/run/dbus/system_bus_socket"
_EXTRA = "pip install 'rcon-plugins[systemd]'"


def enter_scope() -> None:
    """Let systemd move this process, with all its threads, into a new scope that is delegated to it.

    Children stay in their cgroups. Waits for systemd, which removes the scope when the last process in it has ended.
    Raises `DelegationError` with the remedy if systemd cannot be asked, or refuses. This process then stays where it
    was.
    """
    address = _usable_bus()
    try:
        _ask(address)
    except DelegationError:
        raise
    except TimeoutError as error:
        late = f"systemd did not answer within {TIMEOUT_SECONDS:g} s"
        raise _refused(address, late, errno.ETIMEDOUT) from error
    except OSError as error:
        raise _refused(address, f"{address}: {error.strerror or error}", error.errno or errno.EIO) from error


def refusal() -> DelegationError | None:
    """Return why systemd cannot be asked for a scope, with the remedy; None if it can be asked. Sends no request."""
    try:
        _usable_bus()
    except DelegationError as error:
        return error
    return None


def _usable_bus() -> str:
    """Return the address of the bus. Raises DelegationError if there is none, or no jeepney to use it with."""
    address = _bus()
    try:
        import jeepney  # noqa: F401
    except ImportError:
        raise DelegationError(
            "jeepney is not installed, which is needed to get a cgroup from systemd",
            errno=errno.ENOPKG,
            path=address,
            hint=_EXTRA,
        ) from None
    return address


def manager() -> str:
    """Return the name of the manager that gets the request, for messages."""
    return "systemd" if os.geteuid() == 0 else "systemd --user"


def _bus() -> str:
    """Return the address of the bus of this user's manager. Raises DelegationError if there is none."""
    uid = os.geteuid()
    if uid == 0:
        if not is_systemds() or not os.path.exists(_SYSTEM_BUS):
            problem = "D-Bus does not run" if is_systemds() else "systemd is not the init of this machine"
            raise DelegationError(
                problem, errno=errno.ENOENT, path=_SYSTEM_BUS, hint="root can make cgroups without systemd"
            )
        return f"unix:path={_SYSTEM_BUS}"
    # Try pam_systemd's directory, then that of the environment. A directory of another user (after su) does not count.
    for runtime in (f"/run/user/{uid}", os.environ.get("XDG_RUNTIME_DIR", "")):
        if runtime and os.path.exists(f"{runtime}/bus") and os.stat(runtime).st_uid == uid:
            return f"unix:path={runtime}/bus"
    raise DelegationError(
        f"systemd --user does not run for uid {uid}: there is no /run/user/{uid}/bus",
        errno=errno.ENOENT,
        path=f"/run/user/{uid}/bus",
        hint=f"as root, where systemd is the init: apt-get install dbus-user-session; loginctl enable-linger {uid}",
    )


def _ask(address: str) -> None:
    from jeepney.io.blocking import open_dbus_connection

    deadline = time.monotonic() + TIMEOUT_SECONDS
    with open_dbus_connection(address, auth_timeout=TIMEOUT_SECONDS) as connection:
        _check_numbers(connection, address, deadline)
        name = f"rcon-{os.getpid()}-{os.urandom(4).hex()}.scope"
        result = _start(connection, address, name, deadline)
    if result != "done":
        raise _refused(address, f"the scope {name} was not started: {result}", errno.EACCES)


def _check_numbers(connection: DBusConnection, address: str, deadline: float) -> None:
    """Raise DelegationError if the bus knows this process by another pid.

    That is so in another PID namespace; systemd would then move another process.
    """
    from jeepney import DBusAddress, new_method_call

    bus = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
    call = new_method_call(bus, "GetConnectionUnixProcessID", "s", (connection.unique_name,))
    (pid,) = _reply(connection, call, address, deadline)
    if pid != os.getpid():
        raise _refused(
            address,
            f"systemd runs in another PID namespace, where this process is {pid}, not {os.getpid()}",
            errno.ESRCH,
        )


def _start(connection: DBusConnection, address: str, name: str, deadline: float) -> str:
    """Start the scope, and wait for the job. Return its result: ``done``, ``failed``, ``canceled`` ..."""
    from jeepney import DBusAddress, MatchRule, new_method_call
    from jeepney.bus_messages import message_bus

    systemd = DBusAddress(
        "/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager"
    )
    removed = MatchRule(
        type="signal", interface=systemd.interface, member="JobRemoved", path=systemd.object_path
    )
    properties = [
        ("Description", ("s", f"rcon-plugins: cgroups of process {os.getpid()}")),
        ("PIDs", ("au", [os.getpid()])),
        ("Delegate", ("b", True)),
        ("CollectMode", ("s", "inactive-or-failed")),
    ]
    if (ours := own_slice(files.read_own("cgroup"))) is not None:
        properties.append(("Slice", ("s", ours)))
    _reply(connection, message_bus.AddMatch(removed), address, deadline)
    # systemd sends signals only while a client has subscribed.
    _reply(connection, new_method_call(systemd, "Subscribe"), address, deadline)
    call = new_method_call(systemd, "StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "fail", properties, []))
    with connection.filter(removed, bufsize=1000) as signals:
        (job,) = _reply(connection, call, address, deadline)
        while True:
            signal = connection.recv_until_filtered(signals, timeout=_left(deadline))
            _, path, _, result = signal.body
            if path == job:
                return str(result)


def own_slice(membership: str) -> str | None:
    """Return the slice for the scope, so that its limits continue to hold; None lets the manager choose.

    ``membership`` is the text of ``/proc/self/cgroup``. The slice is that of this process, if the manager of the
    request made it. The slice of a login of root does not count: like a scope of ``systemd-run``, the new scope is
    outside of it, and outlives the login.
    """
    path = parse_membership(membership).get(frozenset(), "")
    uid = os.geteuid()
    if uid != 0:
        _, inside, path = path.partition(f"/user@{uid}.service/")
        if not inside:
            return None
    found = next((part for part in reversed(path.split("/")[:-1]) if part.endswith(".slice")), None)
    return None if found is None or found.startswith("user-") else found


def _reply(connection: DBusConnection, call: Message, address: str, deadline: float) -> tuple[Any, ...]:
    from jeepney import DBusErrorResponse
    from jeepney.wrappers import unwrap_msg

    try:
        body: tuple[Any, ...] = unwrap_msg(connection.send_and_get_reply(call, timeout=_left(deadline)))
    except DBusErrorResponse as error:
        said = " ".join(str(part) for part in error.data) or error.name
        raise _refused(address, f"{manager()} refused: {said}", errno.EACCES) from error
    return body


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _refused(address: str, problem: str, number: int) -> DelegationError:
    user = "" if os.geteuid() == 0 else "--user "
    return DelegationError(
        problem,
        errno=number,
        path=address,
        hint=f"journalctl {user}--lines 20 shows the messages of {manager()}",
    )
