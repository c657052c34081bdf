"""The names of groups that servers make: from a policy and a key to the name of a cgroup, and back."""

from __future__ import annotations

import hashlib
import re

_PLAIN_KEY = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,99}")
_WITH_KEY = re.compile(r"(?P<policy>[a-z][a-z0-9_-]{0,62})(?:\.[0-9]+)?(?P<hashed>~~?)(?P<key>.+)")
_GENERATION = re.compile(r"\.[0-9]+(?=~|$)")


def cgroup_name(policy: str, key: str | None, generation: int = 0) -> str:
    """Return the directory name of a confinement: ``policy``, or ``policy~key``.

    After two reloads that changed the policy it is ``policy.2``. A changed policy gets a new cgroup, because workers
    that still finish work under the old policy would write the old limits back.

    Clients send keys. A key that is not plain (host-like, at most 100 characters) becomes ``policy~~HASH``. So every
    key names exactly one directory, and different keys never share one.
    """
    if generation:
        policy = f"{policy}.{generation}"
    if key is None:
        return policy
    if _PLAIN_KEY.fullmatch(key):
        return f"{policy}~{key}"
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=20).hexdigest()
    return f"{policy}~~{digest}"


def split_name(name: str) -> tuple[str | None, str | None]:
    """Return the policy and the key in the name of a group; the policy alone if the key is stored as a hash.

    This is the inverse of `cgroup_name`, as far as possible.
    """
    parts = _WITH_KEY.fullmatch(name)
    if parts is None:
        return None, None
    return parts["policy"], None if parts["hashed"] == "~~" else parts["key"]


def without_generation(name: str) -> str:
    """Return the name that the group had before reloads changed its policy.

    The name of a policy has no dot, so the first one before a ``~`` begins the number of the reloads.
    """
    policy, tilde, key = name.partition("~")
    return _GENERATION.sub("", policy) + tilde + key
