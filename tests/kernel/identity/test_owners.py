"""Who work becomes where files have many owners, and the user database has users in groups."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import userdb
from rcon_plugins.errors import ConfinementError, IdentityRefused, SettingsError
from rcon_plugins.identity import check, resolve
from rcon_plugins.kernel.capability import Identity
from rcon_plugins.policy import Policy

ANNA, BERTA, DEPLOY = 54001, 54002, 54003  # without entries in the user database
STAFF = 54100


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Two tenants, each with a directory of its own, below one that is root's."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)  # what another user is to look at
    home = tmp_path / "sites"
    for name, uid in [("anna", ANNA), ("berta", BERTA)]:
        (home / name / "app").mkdir(parents=True)
        (home / name / "app/main.py").touch()
        for path in (home / name, home / name / "app", home / name / "app/main.py"):
            os.chown(path, uid, STAFF)
    return home


def link(path: Path, target: str, uid: int) -> None:
    path.symlink_to(target)
    os.chown(path, uid, uid, follow_symlinks=False)


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    userdb.forget()
    assert [userdb.entry(uid) for uid in (ANNA, BERTA, DEPLOY)] == [None, None, None]


def test_each_host_is_its_owner(sites: Path) -> None:
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}")
    check(policy)
    assert resolve(policy, {"host": "anna"}) == Identity(ANNA, STAFF, ())
    assert resolve(policy, {"host": "berta"}) == Identity(BERTA, STAFF, ())


def test_the_owner_is_looked_up_anew_for_each_work(sites: Path) -> None:
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}")
    resolve(policy, {"host": "anna"})
    os.chown(sites / "anna", BERTA, STAFF + 1)
    assert resolve(policy, {"host": "anna"}) == Identity(BERTA, STAFF + 1, ())


def test_an_owner_who_has_an_entry_gets_the_groups_of_that(sites: Path) -> None:
    os.chown(sites / "anna", 65534, STAFF)
    assert resolve(Policy.make("p", user=f"owner:{sites}/{{host}}"), {"host": "anna"}) == Identity(
        65534, 65534, tuple(sorted(os.getgrouplist("nobody", 65534)))
    )


def test_group_and_groups_may_be_those_of_paths(sites: Path) -> None:
    os.chown(sites / "anna/app", ANNA, STAFF + 7)
    policy = Policy.make(
        "p", user=ANNA, group=f"owner:{sites}/{{host}}/app", groups=[f"owner:{sites}/{{host}}", 54200]
    )
    check(policy)
    assert resolve(policy, {"host": "anna"}) == Identity(ANNA, STAFF + 7, (STAFF, 54200))


@pytest.mark.parametrize(
    ("uid", "gid", "said"),
    [
        (0, STAFF, "is root"),
        (99, STAFF, "uid 99, and below min_uid = 100"),
        (ANNA, 0, "gid 0, root's"),
        (ANNA, 99, "gid 99, and below min_gid = 100"),
    ],
)
def test_an_owner_below_the_minimum_is_refused(sites: Path, uid: int, gid: int, said: str) -> None:
    os.chown(sites / "anna", uid, gid)
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}", allow_root=False)
    with pytest.raises(IdentityRefused, match=said):
        resolve(policy, {"host": "anna"})
    allowed = Policy.make("p", user=policy.user, min_uid=99, min_gid=99, allow_root=True, groups=[])
    identity = resolve(allowed, {"host": "anna"})
    assert identity is not None
    assert identity.uid == uid


def test_a_static_path_whose_owner_is_refused_is_told_at_the_start(sites: Path) -> None:
    os.chown(sites / "anna", 99, STAFF)
    with pytest.raises(SettingsError, match=r"^policy\.p\.user: the owner of .* uid 99, .* min_uid = 99\)"):
        check(Policy.make("p", user=f"owner:{sites}/anna"))


def test_the_owner_must_be_the_user(sites: Path) -> None:
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}", owner_must_be=f"{sites}/{{host}}/app/{{path}}")
    assert resolve(policy, {"host": "anna", "path": "/main.py"}) == Identity(ANNA, STAFF)
    os.chown(sites / "anna/app/main.py", BERTA, STAFF)
    with pytest.raises(IdentityRefused, match=rf"belongs to uid {BERTA}, and the user is {ANNA}"):
        resolve(policy, {"host": "anna", "path": "/main.py"})
    with pytest.raises(IdentityRefused, match="there is no"):
        resolve(policy, {"host": "anna", "path": "/gone.py"})


NEIGHBOURS = [
    # In anna's directory: where a link leads to, and below sites what is asked for.
    ("../berta", "anna/link"),
    ("../berta/app/main.py", "anna/link"),
    ("..", "anna/link/berta"),
    ("../anna/./hop", "anna/link"),
]


@pytest.mark.parametrize(("target", "asked"), NEIGHBOURS)
def test_a_tenant_cannot_become_its_neighbour_by_a_link(sites: Path, target: str, asked: str) -> None:
    policy = Policy.make("p", user=f"owner:{sites}/{{path}}")
    link(sites / "anna/hop", "../berta", ANNA)
    link(sites / "anna/link", target, ANNA)
    with pytest.raises(IdentityRefused, match=rf"belongs to uid {ANNA}, and what it leads to to {BERTA}"):
        resolve(policy, {"path": asked})


@pytest.mark.parametrize("uid", [0, BERTA, DEPLOY])
def test_links_of_root_and_of_the_neighbour_itself_are_followed(sites: Path, uid: int) -> None:
    os.chown(sites, DEPLOY, DEPLOY)
    link(sites / "anna/link", "../berta/app", uid)
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}/link")
    assert resolve(policy, {"host": "anna"}) == Identity(BERTA, STAFF)


def test_a_tenants_own_links_are_followed(sites: Path) -> None:
    link(sites / "anna/current", "app", ANNA)
    link(sites / "alias", "anna", 0)
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}/current/main.py")
    assert resolve(policy, {"host": "alias"}) == Identity(ANNA, STAFF)


def test_a_server_that_may_not_look_there_refuses(sites: Path, in_child: Callable[..., Any]) -> None:
    (sites / "anna").chmod(0o700)

    def ask(template: str) -> Identity | None:
        os.setgroups([])
        os.setresgid(DEPLOY, DEPLOY, DEPLOY)
        os.setresuid(DEPLOY, DEPLOY, DEPLOY)
        return resolve(Policy.make("p", user=f"owner:{sites}/{template}"), {"host": "anna"})

    with pytest.raises(IdentityRefused, match="Permission denied"):
        in_child(ask, "{host}/app")
    assert in_child(ask, "{host}") == Identity(ANNA, STAFF)
    sites.chmod(0o700)
    with pytest.raises(IdentityRefused, match="Permission denied"):
        in_child(ask, "{host}")
    sites.parent.chmod(0o700)
    with pytest.raises(ConfinementError, match="Permission denied") as refused:
        in_child(ask, "{host}")
    assert type(refused.value) is ConfinementError


def with_databases(tmp_path: Path, passwd: str, group: str, code: str) -> str:
    """What the code prints where /etc/passwd and /etc/group are these, in a mount namespace of its own."""
    for name, text in [("passwd", passwd), ("group", group), ("code.py", code)]:
        (tmp_path / name).write_text(textwrap.dedent(text).lstrip())
    script = (
        f"mount --bind {tmp_path}/passwd /etc/passwd && mount --bind {tmp_path}/group /etc/group && "
        f"exec {sys.executable} {tmp_path}/code.py"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


PASSWD = """
    root:x:0:0:root:/root:/bin/sh
    anna:x:54001:54001::/nonexistent:/usr/sbin/nologin
"""
GROUP = """
    root:x:0:
    adm:x:4:berta,anna
    wheel:x:54500:berta
    anna:x:54001:
    mail:x:54300:berta,anna
    web:x:54200:anna
"""


def test_groups_are_those_of_the_group_database(tmp_path: Path, sites: Path) -> None:
    printed = with_databases(
        tmp_path,
        PASSWD,
        GROUP,
        f"""
        from rcon_plugins.errors import IdentityRefused, SettingsError
        from rcon_plugins.identity import check, resolve
        from rcon_plugins.policy import Policy

        def ask(**keys):
            policy = Policy.make("p", **keys)
            try:
                check(policy)
                print(tuple(resolve(policy, {{"host": "anna"}})))
            except (SettingsError, IdentityRefused) as error:
                print(f"{{type(error).__name__}}: {{error}}")

        ask(user="anna", min_gid=4)
        ask(user=54001, min_gid=4)
        ask(user="owner:{sites}/{{host}}", min_gid=4)
        ask(user="anna", group="web", min_gid=4)
        ask(user="anna", groups=["web"])
        ask(user="anna")
        ask(user="owner:{sites}/{{host}}")
        ask(user="owner:{sites}/{{host}}", groups=[])
        """,
    )
    member = "a group that anna is a member of is gid 4, and below min_gid = 100 (groups = [], or write min_gid = 4)"
    assert printed.splitlines() == [
        "(54001, 54001, (4, 54001, 54200, 54300))",
        "(54001, 54001, (4, 54001, 54200, 54300))",
        "(54001, 54001, (4, 54001, 54200, 54300))",
        "(54001, 54200, (4, 54200, 54300))",
        "(54001, 54001, (54200,))",
        f"SettingsError: policy.p.groups: {member}",
        f"IdentityRefused: groups of policy p: {member}",
        "(54001, 54001, ())",
    ]


def test_a_user_who_is_removed_is_missed_when_the_answer_is_old(tmp_path: Path) -> None:
    printed = with_databases(
        tmp_path,
        PASSWD,
        GROUP,
        f"""
        from pathlib import Path
        from rcon_plugins import userdb
        from rcon_plugins.errors import ConfinementError
        from rcon_plugins.identity import resolve
        from rcon_plugins.policy import Policy

        policy = Policy.make("p", user="anna", groups=[])
        print(resolve(policy, {{}}).uid)
        file = Path("{tmp_path}/passwd")
        file.write_text(file.read_text().replace("anna", "hanna"))
        print(resolve(policy, {{}}).uid)
        userdb.forget()
        try:
            resolve(policy, {{}})
        except ConfinementError as error:
            print(type(error).__name__, error)
        """,
    )
    assert printed.splitlines() == [
        "54001",
        "54001",
        "ConfinementError user of policy p: there is no user 'anna' (did you mean 'hanna'?)",
    ]
