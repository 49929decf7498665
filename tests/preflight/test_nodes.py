"""Which node leads and which address faces the others, asked of the real kernel."""

import socket

import pytest

from rlhfctl.errors import Unable, UsageError
from rlhfctl.preflight.nodes import interface_of, is_local, port_is_free, split_endpoint, this_node


def test_loopback_leads_itself() -> None:
    node = this_node("127.0.0.1:29444")
    assert (node.endpoint, node.address, node.interface, node.leader) == (
        "127.0.0.1:29444",
        "127.0.0.1",
        "lo",
        True,
    )


def test_an_address_of_another_machine_does_not_lead() -> None:
    assert not is_local("192.0.2.1")  # TEST-NET-1, never assigned
    assert interface_of("192.0.2.1") is None


def test_endpoint_forms() -> None:
    assert split_endpoint("node0:123") == ("node0", 123)
    assert split_endpoint("node0") == ("node0", 29400)
    for wrong in (":1", "a:b", "a:70000", "a:0"):
        with pytest.raises(UsageError, match="host:port"):
            split_endpoint(wrong)
    with pytest.raises(Unable, match="cannot resolve"):
        this_node("no-such-host.invalid:1")


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)
