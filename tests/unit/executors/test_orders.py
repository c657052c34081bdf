"""The messages from the host to the fork server."""

from __future__ import annotations

from rcon_plugins.executors import orders
from rcon_plugins.executors.orders import KillOrder, Order, SignalOrder, SpawnOrder
from rcon_plugins.kernel.capability import Identity
from rcon_plugins.settings.policy import Policy


def sent(order: Order) -> Order:
    return orders.unpack(orders.pack(order))


def test_an_order_arrives_as_it_was_sent() -> None:
    policy = Policy(name="shop", isolation="process", pids=10)
    for order in (
        SpawnOrder(1, "shop", "7-1", policy),
        SpawnOrder(2, "shop~a", "7-2", policy, Identity(5, 6, (7,)), output=True),
        KillOrder(3),
        KillOrder(4, ("shop", "7-4")),
        SignalOrder(5, 10),
    ):
        assert sent(order) == order
        assert type(sent(order)) is type(order)


def test_a_policy_is_made_once_and_again_when_it_has_changed() -> None:
    policy, changed = (Policy(name="shop", isolation="process", pids=pids) for pids in (10, 20))
    first, second, third = (
        sent(SpawnOrder(number, "shop", f"7-{number}", one))
        for number, one in enumerate((policy, policy, changed))
    )
    assert isinstance(first, SpawnOrder)
    assert isinstance(second, SpawnOrder)
    assert isinstance(third, SpawnOrder)
    assert first.policy is second.policy
    assert third.policy == changed
