"""The identity of work if files have different owners and the user database has users in groups."""

from __future__ import annotations

import ast
import os
import pwd
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import ConfinementError, IdentityRefused, SettingsError
from rcon_plugins.identity import userdb
from rcon_plugins.identity.resolution import check, resolve
from rcon_plugins.kernel.capability import Identity
from rcon_plugins.settings.policy import Policy
from tests.directories import let_others_read

ANNA, BERTA, DEPLOY = 54001, 54002, 54003  # not in the user database
STAFF = 54100


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Make two tenants, each with a directory of its own, below a directory of root."""
    let_others_read(tmp_path)
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
    assert [userdb.user(uid) for uid in (ANNA, BERTA, DEPLOY)] == [None, None, None]


@pytest.mark.smoke
def test_each_host_is_its_owner(sites: Path) -> None:
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}")
    check(policy)
    assert resolve(policy, {"host": "anna"}) == Identity(ANNA, STAFF, ())
    assert resolve(policy, {"host": "berta"}) == Identity(BERTA, STAFF, ())


def test_the_owner_is_looked_up_for_each_request(sites: Path) -> None:
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}")
    resolve(policy, {"host": "anna"})
    os.chown(sites / "anna", BERTA, STAFF + 1)
    assert resolve(policy, {"host": "anna"}) == Identity(BERTA, STAFF + 1, ())


def test_an_owner_who_has_an_entry_gets_the_groups_of_that(sites: Path) -> None:
    games = pwd.getpwnam("games")
    os.chown(sites / "anna", games.pw_uid, STAFF)
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}", min_uid=1, min_gid=1)
    groups = tuple(sorted(os.getgrouplist("games", games.pw_gid)))
    assert resolve(policy, {"host": "anna"}) == Identity(games.pw_uid, games.pw_gid, groups)


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
        (99, STAFF, "uid 99, which is below min_uid = 100"),
        (ANNA, 0, "gid 0, and the policy forbids root's group"),
        (ANNA, 99, "gid 99, which is below min_gid = 100"),
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


def test_a_forbidden_owner_of_a_static_path_is_refused_at_the_start(sites: Path) -> None:
    os.chown(sites / "anna", 99, STAFF)
    with pytest.raises(SettingsError, match=r"^policy\.p\.user: the owner of .* uid 99, .* min_uid = 99\)"):
        check(Policy.make("p", user=f"owner:{sites}/anna"))


def test_the_owner_must_be_the_user(sites: Path) -> None:
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}", owner_must_be=f"{sites}/{{host}}/app/{{path}}")
    assert resolve(policy, {"host": "anna", "path": "/main.py"}) == Identity(ANNA, STAFF)
    os.chown(sites / "anna/app/main.py", BERTA, STAFF)
    with pytest.raises(IdentityRefused, match=rf"belongs to uid {BERTA}, but the user is uid {ANNA}"):
        resolve(policy, {"host": "anna", "path": "/main.py"})
    with pytest.raises(IdentityRefused, match="there is no"):
        resolve(policy, {"host": "anna", "path": "/gone.py"})


NEIGHBOURS = [
    # The target of a link in anna's directory, and the path below sites that the request names.
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
    with pytest.raises(
        IdentityRefused, match=rf"uid {ANNA} can change a link .*, which leads to a file of uid {BERTA}"
    ):
        resolve(policy, {"path": asked})


@pytest.mark.parametrize("uid", [0, DEPLOY, BERTA])
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_links_that_the_tenant_cannot_have_moved_are_followed(sites: Path, uid: int, mode: int) -> None:
    os.chown(sites, DEPLOY, DEPLOY)
    (sites / "shared").mkdir()
    (sites / "shared").chmod(mode)
    link(sites / "shared/link", "../berta", uid)
    # Name a path below the link: in a sticky directory, fs.protected_symlinks refuses a path that ends with the link.
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}/link/app")
    assert resolve(policy, {"host": "shared"}) == Identity(BERTA, STAFF)


@pytest.mark.parametrize("uid", [0, DEPLOY, BERTA])
@pytest.mark.parametrize("place", ["anna", "anna/root", "anna/deploy/deeper"])
def test_a_tenant_cannot_become_its_neighbour_by_moving_a_link(
    sites: Path, in_child: Callable[..., Any], uid: int, place: str
) -> None:
    """This holds for the link itself and for the directory that contains it, for any owner of the two."""
    os.chown(sites, DEPLOY, DEPLOY)
    directory = sites / place
    directory.mkdir(parents=True, exist_ok=True)
    if place == "anna/deploy/deeper":
        os.chown(directory.parent, DEPLOY, DEPLOY)
    link(directory / "link", os.path.relpath(sites / "berta", directory), uid)

    def move() -> None:
        os.setresuid(ANNA, ANNA, ANNA)
        if place == "anna":
            (directory / "link").rename(sites / "anna/up")
        else:
            top = sites / "/".join(place.split("/")[:2])
            top.rename(sites / "anna/moved")

    in_child(move)
    asked = {"anna": "anna/up", "anna/root": "anna/moved/link"}.get(place, "anna/moved/deeper/link")
    assert (sites / asked).stat().st_uid == BERTA
    policy = Policy.make("p", user=f"owner:{sites}/{{path}}")
    with pytest.raises(
        IdentityRefused, match=rf"uid {ANNA} can change a link .*, which leads to a file of uid {BERTA}"
    ):
        resolve(policy, {"path": asked})


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o2775])
def test_a_link_of_roots_in_a_directory_of_roots_that_others_may_write_to(sites: Path, mode: int) -> None:
    (sites / "shared/deeper").mkdir(parents=True)
    link(sites / "shared/deeper/link", "../../berta", 0)
    policy = Policy.make("p", user=f"owner:{sites}/{{host}}/deeper/link")
    assert resolve(policy, {"host": "shared"}) == Identity(BERTA, STAFF)
    for directory in ("shared/deeper", "shared", "."):
        (sites / directory).chmod(mode)
        with pytest.raises(IdentityRefused, match="any user can make a link on the way"):
            resolve(policy, {"host": "shared"})
        (sites / directory).chmod(0o755)


@pytest.mark.parametrize("uid", [0, BERTA])
def test_a_link_with_two_names_is_not_followed(sites: Path, uid: int) -> None:
    (sites / "shared").mkdir()
    (sites / "shared").chmod(0o1777)
    link(sites / "berta/link", "../berta", uid)
    os.link(sites / "berta/link", sites / "shared/link", follow_symlinks=False)
    with pytest.raises(IdentityRefused, match="any user can make a link on the way"):
        resolve(Policy.make("p", user=f"owner:{sites}/{{host}}/link/app"), {"host": "shared"})


def test_links_of_the_tenant_in_directories_that_a_group_may_write(sites: Path) -> None:
    """A deployment makes such links. A member of the group can move one only within the tenant's own directory."""
    for directory in (sites, sites / "anna"):
        directory.chmod(0o2775)
    (sites / "teams").mkdir()
    os.chown(sites / "teams", DEPLOY, STAFF)
    link(sites / "anna/current", "app", ANNA)
    (sites / "anna").rename(sites / "teams/anna")
    policy = Policy.make("p", user=f"owner:{sites}/{{path}}/current")
    assert resolve(policy, {"path": "teams/anna"}) == Identity(ANNA, STAFF)


KEYS: list[dict[str, Any]] = [
    {"user": "owner:SITES/{host}/app/file"},
    {"user": "owner:SITES/anna/app/file"},
    {"user": BERTA, "group": "owner:SITES/{host}/app/file"},
    {"user": BERTA, "group": STAFF, "groups": ["owner:SITES/{host}/app/file"]},
    {"user": BERTA, "group": STAFF, "owner_must_be": "SITES/{host}/app/file"},
]


def with_sites(sites: Path, keys: dict[str, Any]) -> Policy:
    text = repr(keys).replace("SITES", str(sites))
    return Policy.make("p", **ast.literal_eval(text))


@pytest.mark.parametrize("keys", KEYS)
def test_a_hard_link_to_a_neighbours_file_is_refused(
    sites: Path, in_child: Callable[..., Any], keys: dict[str, Any]
) -> None:
    """The kernel lets a user make a hard link to any file that it may write to, even with protected_hardlinks."""
    theirs, file = sites / "berta/app/main.py", sites / "anna/app/file"
    theirs.chmod(0o666)

    def hard_link() -> None:
        os.setresuid(ANNA, ANNA, ANNA)
        file.hardlink_to(theirs)

    in_child(hard_link)
    theirs.chmod(0o644)
    policy = with_sites(sites, keys)
    with pytest.raises(IdentityRefused, match=r" has 2 hard links, .*copy the file"):
        resolve(policy, {"host": "anna"})
    theirs.unlink()
    assert resolve(policy, {"host": "anna"}) == Identity(BERTA, STAFF, (STAFF,) if "groups" in keys else ())


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
@pytest.mark.parametrize("directory", [True, False])
def test_a_path_that_every_user_can_write_is_refused(
    sites: Path, keys: dict[str, Any], mode: int, directory: bool
) -> None:
    found = sites / "anna/app/file"
    if directory:
        (found / "sub").mkdir(parents=True)  # each subdirectory adds a link to its parent directory
    else:
        found.touch()
    os.chown(found, BERTA, STAFF)
    policy = with_sites(sites, keys)
    assert resolve(policy, {"host": "anna"}) is not None
    found.chmod(mode)
    with pytest.raises(IdentityRefused, match=r"every user can write to '.*\(chmod o-w\)"):
        resolve(policy, {"host": "anna"})


def test_a_static_path_that_every_user_can_write_is_refused_at_the_start(sites: Path) -> None:
    (sites / "anna").chmod(0o777)
    with pytest.raises(SettingsError, match=r"^policy\.p\.user: every user can write to"):
        check(Policy.make("p", user=f"owner:{sites}/anna"))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"user": "owner:SITES/{host}"}, "user"),
        ({"user": "owner:SITES/{host}", "group": STAFF, "groups": []}, "user"),
        ({"user": ANNA, "group": STAFF, "owner_must_be": "SITES/{host}"}, "owner_must_be"),
        ({"user": "nobody", "group": "owner:SITES/berta", "owner_must_be": "SITES/{host}"}, "owner_must_be"),
    ],
)
def test_an_owner_who_is_not_known_here(sites: Path, keys: dict[str, Any], key: str) -> None:
    os.chown(sites / "anna", 65534, STAFF)
    with pytest.raises(
        IdentityRefused,
        match=rf"^{key} of policy p: the path belongs to uid 65534, which stands for all unknown",
    ):
        resolve(with_sites(sites, keys), {"host": "anna"})


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"user": "owner:SITES/{host}"}, "group"),
        ({"user": ANNA, "group": "owner:SITES/{host}"}, "group"),
        ({"user": ANNA, "group": STAFF, "groups": [STAFF, "owner:SITES/{host}"]}, "groups[2]"),
    ],
)
def test_a_group_that_is_not_known_here(sites: Path, keys: dict[str, Any], key: str) -> None:
    os.chown(sites / "anna", ANNA, 65534)
    with pytest.raises(
        IdentityRefused,
        match=rf"^{re.escape(key)} of policy p: the path belongs to gid 65534, which stands for",
    ):
        resolve(with_sites(sites, keys), {"host": "anna"})
    allowed = Policy.make("p", user=f"owner:{sites}/{{host}}", group="nogroup", groups=[])
    assert resolve(allowed, {"host": "anna"}) == Identity(ANNA, 65534)


def test_an_owner_outside_the_user_namespace_is_refused(sites: Path) -> None:
    code = (
        "import sys; from rcon_plugins.errors import IdentityRefused\n"
        "from rcon_plugins.identity.resolution import resolve\n"
        "from rcon_plugins.settings.policy import Policy\n"
        "try: resolve(Policy.make('p', user='owner:' + sys.argv[1] + '/{host}'), {'host': 'anna'})\n"
        "except IdentityRefused as refused: print(refused)"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", code, str(sites)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "belongs to uid 65534, which stands for all unknown owners (overflow id)" in done.stdout


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
    """Return the output of the code with this /etc/passwd and /etc/group, in a mount namespace of its own."""
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
        from rcon_plugins.identity.resolution import check, resolve
        from rcon_plugins.settings.policy import Policy

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
    member = (
        "a group that anna is a member of is gid 4, which is below min_gid = 100 "
        "(groups = [], or write min_gid = 4)"
    )
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


def test_a_removed_user_is_noticed_when_the_cache_expires(tmp_path: Path) -> None:
    printed = with_databases(
        tmp_path,
        PASSWD,
        GROUP,
        f"""
        from pathlib import Path
        from rcon_plugins.identity import userdb
        from rcon_plugins.errors import ConfinementError
        from rcon_plugins.identity.resolution import resolve
        from rcon_plugins.settings.policy import Policy

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
