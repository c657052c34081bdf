"""One limit of a policy, changed by a key and a text as `celery control rcon_set` has it: what is refused."""

from __future__ import annotations

import pytest

from rcon_plugins.confinement.live_policies import changed
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.policy import Policy

POLICY = Policy.make("small", memory="1G", each={"memory": "128M"}, io={"/": {"read": "1M"}})

WRONG = [
    ("memory", "1x", "policy.small.memory: '1x' is not a size (write"),
    ("each.memory", "much", "policy.small.each.memory: 'much' is not a size"),
    ("max_uses", "1", "policy.small.max_uses: is not a limit that can be changed while work"),
    ("io", "1M", "policy.small.io: is not a limit that can be changed while work"),
    ("pids", "0", "policy.small.pids: 0 is refused: expected integer >= 1"),
    ("io.read", "1M", "policy.small.io.read: no device is named (io.DEVICE.KEY, the KEY one"),
    ("io./.read", "fast", "policy.small.io./.read: 'fast' is not a size"),
    ("io./", "{ read = 'fast' }", "policy.small.io./.read: 'fast' is not a size"),
    ("io./", "{ speed = 1 }", "policy.small.io./.speed: "),
    ("memory", "{ limit = 1", "policy.small.memory: '{ limit = 1' is no table (as in"),
    ("memory", '{ limit = "1G" }', "policy.small.memory: the key 'expand' is missing"),
    ("cpu_weight", "max", "policy.small.cpu_weight: 'max' is not a whole number"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG)
def test_an_invalid_limit_is_refused_with_its_key(key: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        changed(POLICY, key, value)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
