"""Look up accounts: real files, real links, the real user database. Tests with chown are in tests/kernel/identity."""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rcon_plugins.errors import ConfinementError, IdentityRefused, KernelError, SettingsError
from rcon_plugins.identity import userdb
from rcon_plugins.identity.resolution import check, kept_capabilities, resolve
from rcon_plugins.kernel import paths
from rcon_plugins.kernel.capability import Capabilities, Identity, read_state
from rcon_plugins.settings.policy import Policy

#: Keys that let these tests run as any user, who owns the files they make.
ANYBODY: dict[str, Any] = {"min_uid": 1, "min_gid": 1, "allow_root": True}
ENTRY = userdb.user(os.geteuid())
ME = Identity(os.geteuid(), ENTRY.gid if ENTRY else os.getegid())
OTHER = 4001 if ME.uid != 4001 else 4002


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Make a directory of sites. Anna's site has an application; a directory beside the sites is outside of them."""
    (tmp_path / "sites/anna/app/deep").mkdir(parents=True)
    (tmp_path / "sites/anna/app/main.py").touch()
    (tmp_path / "outside/anna").mkdir(parents=True)
    return tmp_path / "sites"


def policy(user: object = None, **keys: object) -> Policy:
    return Policy.make("p", user=user, **{**ANYBODY, "groups": [], **keys})


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_without_a_user_there_is_no_identity() -> None:
    plain = Policy.make("p", capabilities=["chown"], umask="027")
    assert resolve(plain, {}) is None
    check(plain)


def test_a_static_user_gets_its_groups() -> None:
    nobody = pwd.getpwnam("nobody")
    identity = Identity(nobody.pw_uid, nobody.pw_gid, tuple(sorted(os.getgrouplist("nobody", nobody.pw_gid))))
    for user in ("nobody", nobody.pw_uid, str(nobody.pw_uid)):
        named = Policy.make("p", user=user)
        check(named)
        assert resolve(named, {}) == identity


def test_groups_that_are_written_replace_the_others() -> None:
    named = Policy.make("p", user="nobody", group=4001, groups=[4003, 4002, 4003])
    check(named)
    assert resolve(named, {}) == Identity(pwd.getpwnam("nobody").pw_uid, 4001, (4002, 4003))
    assert resolve(Policy.make("p", user="nobody", groups=[]), {}) == Identity(65534, 65534, ())


def test_a_number_without_an_entry_has_the_group_it_is_given_and_no_other() -> None:
    number = next(n for n in range(3_000_000_000, 4_000_000_000) if userdb.user(n) is None)
    assert resolve(Policy.make("p", user=number, group=4001), {}) == Identity(number, 4001, ())
    with pytest.raises(SettingsError, match=r"^policy\.p\.user: uid .* no entry .* \(name the group"):
        check(Policy.make("p", user=number))
    with pytest.raises(ConfinementError, match="no entry") as refused:
        resolve(Policy.make("p", user=number), {})
    assert type(refused.value) is ConfinementError


@pytest.mark.parametrize(
    "template",
    [
        "{host}",
        "{host}/app",
        "{host}/app/main.py",
        "{host}/app/",
        "{host}//app/./main.py",
        "an{header:x-rest}",
        "{path:1}{header:x-rest}/app",
        "{path}",
        "{host}/{path}",
        "{host}/./{path}",
    ],
)
def test_attributes_are_filled_in(sites: Path, template: str) -> None:
    work = {"host": "anna", "header:x-rest": "na", "path:1": "an", "path": "/"}
    owner = policy(f"owner:{sites}/{template}")
    check(owner)
    assert resolve(owner, work) == ME


@pytest.mark.parametrize("path", ["/anna/app/main.py", "//anna//app/", "anna", "/", "", "/.", "/anna/./app"])
def test_the_path_of_a_request_is_below(sites: Path, path: str) -> None:
    owner = policy(f"owner:{sites}/{{path}}")
    if path:
        assert resolve(owner, {"path": path}) == ME
    else:
        with pytest.raises(IdentityRefused, match="not a file name"):
            resolve(owner, {"path": path})


def test_a_path_without_placeholders_is_resolved_as_it_is(sites: Path) -> None:
    (sites / "link").symlink_to(sites.parent / "outside")
    owner = policy(f"owner:{sites}/link/anna", group=f"owner:{sites}", owner_must_be=str(sites / "link"))
    check(owner)
    assert resolve(owner, {}) == ME._replace(gid=sites.stat().st_gid)


def test_the_owner_must_be_the_user(sites: Path) -> None:
    right = policy(ME.uid, group=ME.gid, owner_must_be=f"{sites}/{{host}}/app")
    assert resolve(right, {"host": "anna"}) == ME
    wrong = Policy.make("p", user=OTHER, group=OTHER, owner_must_be=f"{sites}/{{host}}/app")
    check(wrong)
    with pytest.raises(IdentityRefused, match=rf"belongs to uid {ME.uid}, but the user is uid {OTHER}"):
        resolve(wrong, {"host": "anna"})
    with pytest.raises(SettingsError, match=r"^policy\.p\.owner_must_be: .* belongs to uid"):
        check(Policy.make("p", user=OTHER, group=OTHER, owner_must_be=f"{sites}/anna"))


LINKS_OUT = [
    # Targets of anna's `app/link`. ABSOLUTE stands for tmp_path.
    "/",
    "/proc/self/root",
    "ABSOLUTE/outside/anna",
    "ABSOLUTE/sites/anna",  # inside, but an absolute path: the kernel treats it as outside
    "../../../outside/anna",
    "../../../sites/anna",
    "../../../../../../../../../../etc",
    "other/../../../../outside",
]


@pytest.mark.parametrize("target", LINKS_OUT)
@pytest.mark.parametrize(
    "template", ["{host}/app/link", "{host}/app/link/", "{path}", "{host}/app/link/anna"]
)
def test_no_link_leads_out(sites: Path, target: str, template: str) -> None:
    link = sites / "anna/app/link"
    link.symlink_to(target.replace("ABSOLUTE", str(sites.parent)))
    (sites / "anna/app/other").symlink_to("deep")
    before = descriptors()
    with pytest.raises(IdentityRefused, match=r"leads out of .*/sites"):
        resolve(policy(f"owner:{sites}/{template}"), {"host": "anna", "path": "/anna/app/link"})
    assert descriptors() == before


def test_the_site_itself_may_not_be_a_link_out(sites: Path) -> None:
    (sites / "berta").symlink_to("../outside/anna")
    with pytest.raises(IdentityRefused, match="leads out"):
        resolve(policy(f"owner:{sites}/{{host}}"), {"host": "berta"})


@pytest.mark.parametrize(
    "target", ["deep", "./deep/../main.py", "../app/deep", "../../anna/app", "hop", "..//../anna/."]
)
def test_links_within_are_followed(sites: Path, target: str) -> None:
    (sites / "anna/app/hop").symlink_to("deep/")
    (sites / "anna/app/link").symlink_to(target)
    (sites / "berta").symlink_to("anna")
    before = descriptors()
    assert resolve(policy(f"owner:{sites}/{{host}}/app/link"), {"host": "berta"}) == ME
    assert descriptors() == before


@pytest.mark.parametrize("depth", [1, 200])
def test_links_without_end(sites: Path, depth: int) -> None:
    """A circle of links, a chain of too many links and a deep path leave no descriptor open."""
    (sites / "circle").symlink_to("./circle")
    (sites / "here").symlink_to(".")
    place = sites / "d"
    for _ in range(depth):
        place.mkdir()
        place /= "d"
    for path in ("circle", "here/" * 41 + "anna", "here" + "/d" * depth + "/gone"):
        before = descriptors()
        with pytest.raises(IdentityRefused):
            resolve(policy(f"owner:{sites}/{{path}}"), {"path": path})
        assert descriptors() == before
    assert resolve(policy(f"owner:{sites}/{{path}}"), {"path": "here/" * 40 + "anna"}) == ME
    assert resolve(policy(f"owner:{sites}/{{path}}"), {"path": "d/" * depth}) == ME


@pytest.mark.parametrize(
    ("host", "said"),
    [
        (None, "the attribute host is missing"),
        ("", "not a file name"),
        (".", "not a file name"),
        ("..", "not a file name"),
        ("anna/", "not a file name"),
        ("../outside/anna", "not a file name"),
        ("/etc", "not a file name"),
        ("anna\0", "not a file name"),
        ("berta", "there is no '.*/sites/berta'"),
        ("x" * 256, "File name too long"),
        ("x" * 5000, "File name too long"),
        ("\ud800", "Invalid argument"),
        ("\udcff", "there is no"),
        ("anna\n", "there is no"),
        ("{host}", "there is no"),
    ],
)
def test_values_that_are_no_names(sites: Path, host: str | None, said: str) -> None:
    before = descriptors()
    with pytest.raises(IdentityRefused, match=said) as refused:
        resolve(policy(f"owner:{sites}/{{host}}"), {} if host is None else {"host": host})
    assert str(refused.value).startswith("user of policy p: ")
    str(refused.value).encode()
    assert len(str(refused.value)) < 400
    assert descriptors() == before


@pytest.mark.parametrize(
    "path", ["/../outside", "/anna/..", "/anna/../../outside", "..", "/anna/\0", "/x/.."]
)
def test_a_path_does_not_go_back_up(sites: Path, path: str) -> None:
    with pytest.raises(IdentityRefused):
        resolve(policy(f"owner:{sites}/{{path}}"), {"path": path})


def test_text_around_a_value_does_not_make_it_go_back_up(sites: Path) -> None:
    for template, work in [("{path}./x", {"path": "/anna/."}), (".{host}", {"host": "./x"})]:
        with pytest.raises(IdentityRefused):
            resolve(policy(f"owner:{sites}/{template}"), work)


def test_a_file_is_no_directory(sites: Path) -> None:
    with pytest.raises(IdentityRefused, match="Not a directory"):
        resolve(policy(f"owner:{sites}/{{path}}"), {"path": "/anna/app/main.py/x"})


HOSTILE = st.one_of(
    st.text(max_size=300),
    st.text(st.characters(categories=["Cs", "Cc", "Po", "L"])),
    st.text("./\0a\udc80", max_size=30),
    st.lists(st.sampled_from(["..", ".", "/", "", "anna", "app", "out", "in", "\0", "~", "%2e%2e"])).map(
        "/".join
    ),
    st.integers(1, 5000).map("a".__mul__),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(value=HOSTILE, other=HOSTILE)
@example(value="../outside/anna", other="..")
@example(value="out", other="/out")
@example(value="\ud800", other="/\udfff")
def test_any_input_gives_an_owner_below_the_directory_or_a_refusal(
    sites: Path, value: str, other: str
) -> None:
    for name, target in [("out", "../outside"), ("in", "anna")]:
        if not (sites / name).is_symlink():
            (sites / name).symlink_to(target)
    before = descriptors()
    work = {"host": value, "path": other, "header:x-tenant": value}
    for template in ("{host}", "{host}/{path}", "{path}", "{header:x-tenant}.d/x", "a{host}/app"):
        try:
            identity = resolve(policy(f"owner:{sites}/{template}"), work)
        except IdentityRefused as refused:
            str(refused).encode()
            continue
        assert identity == ME
        filled = template.format_map({**work, "path": other.lstrip("/")})
        assert (sites / filled).resolve().is_relative_to(sites)
    assert descriptors() == before


def test_errors_of_the_machine_are_not_blamed_on_the_request(sites: Path) -> None:
    gone = sites / "gone"
    owner = policy(f"owner:{gone}/{{host}}")
    with pytest.raises(SettingsError, match=r"^rcon\.toml: policy\.p\.user: .*gone.*No such file") as found:
        check(owner, "rcon.toml")
    assert (found.value.file, found.value.value) == ("rcon.toml", f"{gone}/{{host}}")
    for work in ({"host": "anna"}, {"host": "x"}):
        with pytest.raises(ConfinementError, match="No such file or directory") as refused:
            resolve(owner, work)
        assert type(refused.value) is ConfinementError
    with pytest.raises(SettingsError, match="Not a directory"):
        check(policy(f"owner:{sites}/anna/app/main.py/{{host}}"))


WRONG: list[tuple[dict[str, object], str, str]] = [
    # The keys of the policy, the key in the message, and a word of the problem or remedy.
    ({"user": "root"}, "user", "allow_root = true"),
    ({"user": 0}, "user", "root, and the policy forbids root"),
    ({"user": "owner:/"}, "user", "'/' is root"),
    ({"user": "bin"}, "user", "write min_uid = 2"),
    ({"user": "nobodyy"}, "user", "did you mean 'nobody'"),
    ({"user": "no.such.user.anywhere"}, "user", "there is no user"),
    ({"user": "owner:/no/such/path"}, "user", "there is no '/no/such/path'"),
    ({"user": "nobody", "group": "root"}, "group", "the group root is gid 0"),
    ({"user": "nobody", "group": 0}, "group", "allow_root = true"),
    ({"user": "nobody", "group": "owner:/"}, "group", "the group of the path is gid 0"),
    ({"user": "nobody", "group": "adm"}, "group", "write min_gid = 4"),
    ({"user": "nobody", "group": "nogrou"}, "group", "did you mean 'nogroup'"),
    ({"user": "nobody", "groups": ["nogroup", "adm"]}, "groups[2]", "min_gid = 100"),
    ({"user": "nobody", "groups": [0]}, "groups[1]", "gid 0"),
    ({"user": "nobody", "min_uid": 65535}, "user", "below min_uid = 65535"),
    ({"user": "nobody", "min_gid": 65535}, "group", "the primary group of nobody is gid 65534"),
    ({"user": "owner:/tmp/{host}", "groups": ["adm"]}, "groups[1]", "adm"),
    ({"user": "owner:/tmp/{host}", "group": "owner:/no/such/{host}"}, "group", "/no/such"),
    ({"user": "nobody", "owner_must_be": "/no/such/{host}"}, "owner_must_be", "/no/such"),
    ({"capabilities": ["chown", "net_bind_servic"]}, "capabilities[2]", "did you mean 'net_bind_service'"),
    ({"capabilities": ["63"]}, "capabilities[1]", "capabilities(7)"),
]


@pytest.mark.parametrize(("keys", "key", "said"), WRONG)
def test_errors_at_the_start_name_key_and_remedy(keys: dict[str, object], key: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        check(Policy.make("p", **keys))
    assert refused.value.key == f"policy.p.{key}"
    assert said in str(refused.value)
    assert refused.value.hint


def test_a_directory_that_is_open_to_all_names_no_owner(sites: Path) -> None:
    (sites / "open").mkdir()
    (sites / "open").chmod(0o1777)
    with pytest.raises(SettingsError, match=r"policy\.p\.user: every user can write to '.*open'") as refused:
        check(policy(f"owner:{sites}/open"))
    assert refused.value.hint == "chmod o-w"


def test_a_removed_static_account_is_an_error_of_the_machine() -> None:
    for keys in ({"user": "no.such.user"}, {"user": "nobody", "group": "no.such.group"}, {"user": "root"}):
        with pytest.raises(ConfinementError) as refused:
            resolve(Policy.make("p", **keys), {})
        assert type(refused.value) is ConfinementError


def test_root_with_leave() -> None:
    root = Policy.make("p", user="root", groups=[], allow_root=True)
    check(root)
    assert resolve(root, {}) == Identity(0, 0, ())
    with pytest.raises(SettingsError, match="below min_uid"):
        check(Policy.make("p", user="bin", allow_root=True))


def test_capabilities_that_are_kept() -> None:
    assert kept_capabilities(Policy.make("p")) == Capabilities.of()
    assert kept_capabilities(Policy.make("p", capabilities=[])) == Capabilities.of()
    some = Policy.make("p", capabilities=["CAP_CHOWN", "net_bind_service", "1"])
    check(some)
    assert kept_capabilities(some) == Capabilities.of(0, 1, "net_bind_service")
    everything = Policy.make("p", capabilities=["all"])
    check(everything)
    assert kept_capabilities(everything) == read_state().permitted


def test_the_databases_are_cached_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    clock = [100.0]
    monkeypatch.setattr("rcon_plugins.identity.userdb.time.monotonic", lambda: clock[0])

    @userdb._for_a_while
    def question(word: str) -> str | None:
        asked.append(word)
        return None

    assert [question("a"), question("a"), question("b")] == [None, None, None]
    assert asked == ["a", "b"]
    clock[0] += userdb.LIFE
    question("a")
    assert asked == ["a", "b", "a"]
    userdb.forget()
    question("a")
    assert asked == ["a", "b", "a", "a"]
    for number in range(2 * userdb._MOST):
        question(str(number))
    assert len(userdb._kept) <= userdb._MOST


def test_the_kernel_itself_keeps_to_the_directory(sites: Path) -> None:
    """`open_beneath` alone opens no link and no path outside. It raises the kernel's errors."""
    (sites / "link").symlink_to("anna")
    directory = paths.open_directory(str(sites))
    try:
        descriptor = paths.open_beneath(directory, "anna/app/../app")
        assert os.path.samestat(os.fstat(descriptor), (sites / "anna/app").stat())
        assert not os.get_inheritable(descriptor)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(descriptor, 1)  # a directory, and O_PATH at that
        os.close(descriptor)
        for path, number in [
            ("link", errno.ELOOP),
            ("link/app", errno.ELOOP),
            ("..", errno.EXDEV),
            ("anna/../..", errno.EXDEV),
            ("/etc", errno.EXDEV),
            ("gone", errno.ENOENT),
            ("", errno.ENOENT),
            ("a\0", errno.EINVAL),
            ("\ud800", errno.EINVAL),
        ]:
            with pytest.raises(KernelError) as refused:
                paths.open_beneath(directory, path)
            assert (refused.value.errno, path) == (number, path)
    finally:
        os.close(directory)


def test_ten_times_as_many_results_as_the_cache_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userdb, "_MOST", 50)
    userdb.forget()
    for number in range(500):
        userdb.user(3_000_000_000 + number)
        assert len(userdb._kept) <= 50
    userdb.forget()


def test_an_entry_for_which_there_is_no_memory_is_no_missing_user() -> None:
    """getpwnam(3) says ENOMEM. It is asked again the next time."""

    @userdb._for_a_while
    def ask(name: str) -> int:
        asked.append(name)
        if len(asked) == 1:
            raise MemoryError
        return 7

    asked: list[str] = []
    with pytest.raises(KernelError, match="no memory") as caught:
        ask("anna")
    assert caught.value.errno == errno.ENOMEM
    assert (ask("anna"), asked) == (7, ["anna", "anna"])
