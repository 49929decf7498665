"""Where this node stands in a run over several: which address reaches the others, and whether it hosts the meeting.

torchrun guesses both from the host name, which on many machines resolves to an address that the others cannot
reach; it then waits a minute and gives up. Asking the kernel for the route and trying to bind is exact.
"""

import fcntl
import socket
import struct
from dataclasses import dataclass

from rlhfctl.errors import Unable, UsageError

SIOCGIFADDR = 0x8915
DEFAULT_PORT = 29400


@dataclass(frozen=True, slots=True)
class Node:
    """leader: this node hosts the rendezvous and writes the run directory. interface: owns `address`."""

    endpoint: str
    address: str
    interface: str | None
    leader: bool


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """host:port; UsageError where it is neither host nor host:port."""
    host, _, port = endpoint.partition(":")
    if not host or (port and not port.isdigit()) or (port and not 0 < int(port) < 65536):
        raise UsageError(f"launch.rdzv_endpoint must be host:port of node 0, not {endpoint!r}")
    return host, int(port) if port else DEFAULT_PORT


def this_node(endpoint: str) -> Node:
    """Look the endpoint up and ask the kernel which of our addresses faces it."""
    host, port = split_endpoint(endpoint)
    try:
        target = socket.gethostbyname(host)
    except OSError as error:
        raise Unable(
            f"launch.rdzv_endpoint: cannot resolve {host} ({error}); give node 0's address"
        ) from None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, port))  # sends nothing: it only picks the route
            address = probe.getsockname()[0]
    except OSError as error:
        raise Unable(
            f"launch.rdzv_endpoint: no route from this machine to {host} ({error}); check the network"
        ) from None
    return Node(f"{host}:{port}", address, interface_of(address), is_local(target))


def is_local(address: str) -> bool:
    """Whether the address belongs to this machine (or this network namespace): only then can it be bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def port_is_free(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
