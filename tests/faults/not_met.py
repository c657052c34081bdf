"""The calls that no scenario meets, and why. A new call that is not met has to be added here, with its reason.

Each name is that of a call, or the beginning of several. `tests.kernel.faults` checks that all of them are still there,
and that none of them is met.
"""

from __future__ import annotations

_ATTACH = "rcon attach; no request is served"
_LOCK = "rcon attach, and rcon run --in (tests/kernel/command/test_in.py); no request is served"
_EXPLAIN = "an explanation for a person, or a remedy in an error message; nothing runs because of it"
_TERMINAL = "job control of rcon run on a terminal: tests/kernel/command/test_terminal.py"
_DISK = "a limit on IO, judged at the start, for a real disk; an error there refuses the start"
_OTHER_BASE = "the search for a base that the settings do not name; an error there refuses the start"
_CONTAINER = "a container on cgroup v2 with a shell: tests/kernel/tree/test_container_root.py"
_LONG = "only for paths of more than 1000 characters, in directories of other users"
_OTHER_NAMESPACE = "an owner in another PID or IPC namespace, seen by rcon ls, gc and check"
_HTTP = "the connection of an HTTP client: tests/integrations/wsgi, tests/integrations/gunicorn"
_GUNICORN = "a start of gunicorn; an error there refuses the start"
_ITSELF = "a signal of a process to itself, which kill(2) permits"
_RARE = "after another failure, or for a request of a kind that the scenarios do not make"

NOT_MET = {
    "command.job_control:Caller._forward": "a signal to rcon run, for its command",
    "command.job_control:Caller._leave_group:os.setpgid#2": _TERMINAL,
    "command.job_control:Caller._stop": _TERMINAL,
    "command.job_control:_open_terminal": _TERMINAL,
    "command.run:_Run._start:os.kill": _RARE,
    "command.run:_Run._become_command:os.write#2": "tells of a command that cannot be executed",
    "kernel.process:_kill_as": "a server that is not root and may change users: tests/kernel/identity",
    "tree.attach": _ATTACH,
    "tree.previous_cgroups": _ATTACH,
    "kernel.files:locked": _LOCK,
    "kernel.files:_try_lock": _LOCK,
    "kernel.proc:visible_pid": _ATTACH,
    "kernel.proc:parents": _ATTACH,
    "tree.doctor": _EXPLAIN,
    "kernel.features": _EXPLAIN,
    "kernel.capability.exec_rule": _EXPLAIN,
    "kernel.capability.files": _EXPLAIN,
    "kernel.proc:is_alive:os.listdir": _OTHER_NAMESPACE,
    "kernel.proc:_namespace_of": _OTHER_NAMESPACE,
    "kernel.proc:ipc_namespace": _OTHER_NAMESPACE,
    "tree.runtime:make_folder:os.chmod": "the folder of the tally is there, with its mode",
    "tree.runtime:end:os.rmdir": "the tally of a server whose exporter has read its end",
    "tree.runtime:has_ended": "read by rcon top and exporters; no request is served",
    "kernel.proc:other_threads": "names threads that a library started in a fork; nothing is served then",
    "kernel.descriptors:fork_beside": _ATTACH,
    "identity.userdb:user_names": _EXPLAIN,
    "identity.userdb:group_names": _EXPLAIN,
    "tree.base:_user_name": _EXPLAIN,
    "kernel.cgroup.device": _DISK,
    "kernel.cgroup.hierarchy:_file": _DISK,
    "kernel.cgroup.hierarchy:_directory_with": "cpu_burst and swap, judged at the start",
    "kernel.cgroup.mounts:is_systemds": _OTHER_BASE,
    "tree.base:_is_": _OTHER_BASE,
    "kernel.proc:cgroup_namespace": _CONTAINER,
    "tree.systemd": _OTHER_BASE,
    "kernel.files:_open_directory:os.open#2": _LONG,
    "kernel.files:_Parent": _LONG,
    "kernel.files:_status:os.stat": _LONG,
    "kernel.paths:owner:": _RARE,
    "kernel.paths:_follow": "the path of `user = owner:` is followed by hand only where openat2(2) is missing",
    "kernel.events.sources:Numbers.read": _RARE,
    "kernel.events.sources:Stall": "pressure information, where a plugin listens",
    "kernel.landlock:_allow:os.open": "`rcon run` and `capcon run` with paths; mounts made after the start",
    "kernel.process:raise_descriptor_limit:resource.setrlimit": "the limit of this process is high enough",
    "kernel.process:open_missing_standard_files:os.set_inheritable": "the server has its standard files",
    "kernel.shared_memory:_files_of": _RARE,
    "kernel.syscalls:disconnect": _HTTP,
    "connections": _HTTP,
    "rcon_gunicorn.hooks": _ITSELF,
    "rcon_gunicorn.trial": "a worker on trial at a reload of gunicorn: test_reload.py; an error refuses the reload",
    "rcon_celery.pool_process:PoolProcess._lost:os.kill": _ITSELF,
    "rcon_gunicorn.master:Boots.__init__": _GUNICORN,
    "rcon_gunicorn.master:Boots.": "one page of memory, which the master has written to",
    "rcon_celery.service:ProcessState.restore:os.chdir#2": "the working directory of the worker was removed",
    "rcon_celery.service:ProcessState.restore:_signal.signal": "a task replaced the handler of a soft limit",
    "tally.writer:Tally._take_slot:os.unlink": _RARE,
    "tally.reader": "rcon top, stat and ls, and remote control; no request is served",
    "executors.channel:Channel.refuse": "the response of an HTTP request: tests/integrations/wsgi",
    "executors.fork_server:ForkServer._make_child": "where no process can begin in its cgroup: test_fork_hooks.py",
    "executors.inherited:InheritedFiles.__init__:open": "standard streams of Python under other descriptors",
    "executors.inherited:InheritedFiles.replace:os.dup2#3": _RARE,
    "executors.process:ProcessExecutors._end_server:os.kill": _RARE,
    "executors.records:_log:posix.write": "a server whose loggers have no handler: test_records.py",
    "identity.userdb:group_named": "a group by its name; one user by name stands for both",
}


def reason(site: str) -> str | None:
    """Return why no scenario meets a call; None if one has to."""
    return next((why for name, why in NOT_MET.items() if site.startswith(name)), None)
