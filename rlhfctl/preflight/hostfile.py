"""A hostfile: the machines of a run, `HOST slots=N` a line, `#` starts a comment; the first one leads.

It stands for launch.nnodes, nproc_per_node and rdzv_endpoint; the same command is given on every host.
"""

import errno
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from rlhfctl.errors import Unable, UsageError
from rlhfctl.preflight.nodes import DEFAULT_PORT, is_local
from rlhfctl.recipe.sections import Launch

LINE = re.compile(r"(\S+)\s+slots=(\d+)$")
SSH = 22


@dataclass(frozen=True, slots=True)
class Host:
    """slots: processes that run there."""

    name: str
    slots: int


def read_hosts(path: str) -> list[Host]:
    """Raises UsageError with the line that is wrong."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"launch.hostfile: cannot read {path}: {reason}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = LINE.match(text)
        if found is None:
            raise UsageError(f"{path}:{number}: a line of a hostfile is `HOST slots=N`, not {text!r}")
        host = Host(found[1], int(found[2]))
        if host.slots == 0:
            raise UsageError(f"{path}:{number}: {host.name} has no slots: remove the line, or give it some")
        if host.name in [other.name for other in hosts]:
            raise UsageError(f"{path}:{number}: {host.name} stands there twice")
        hosts.append(host)
    if not hosts:
        raise UsageError(f"launch.hostfile: {path} names no host: a line is `HOST slots=N`")
    uneven = next((host for host in hosts if host.slots != hosts[0].slots), None)
    if uneven is not None:
        raise UsageError(
            f"launch.hostfile: {uneven.name} has {uneven.slots} slots, {hosts[0].name} {hosts[0].slots}: "
            "all hosts must have equally many"
        )
    return hosts


def expanded(launch: Launch) -> Launch:
    """The launch keys that the hostfile stands for, with this host's place in it; without one, `launch` itself.

    Raises Unable where this machine is none of the hosts."""
    if launch.hostfile is None:
        return launch
    hosts = read_hosts(launch.hostfile)
    keys: dict[str, object] = {"hostfile": None, "nnodes": len(hosts), "nproc_per_node": hosts[0].slots}
    if len(hosts) > 1:
        keys["rdzv_endpoint"] = launch.rdzv_endpoint or f"{hosts[0].name}:{DEFAULT_PORT}"
        if launch.launcher != "torchrun" and not launch.max_restarts:  # torchrun's nodes number themselves
            keys["node_rank"] = own_place(launch.hostfile, hosts)
    return launch.model_copy(update=keys)


def own_place(path: str, hosts: list[Host]) -> int:
    for place, host in enumerate(hosts):
        try:
            if is_local(socket.gethostbyname(host.name)):
                return place
        except OSError:
            continue  # a name of another host that only its neighbours know: preflight tells
    names = ", ".join(host.name for host in hosts)
    raise Unable(f"launch.hostfile: this machine ({os.uname().nodename}) is none of {names} in {path}")


def unreachable(host: str, port: int, seconds: float = 2.0) -> str | None:
    """Why the host does not answer, None where it does: a refused connection is an answer too."""
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        return f"its name cannot be resolved ({error.strerror})"
    reason = ""
    for door in (port, SSH):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.settimeout(seconds)
            try:
                probe.connect((address, door))
                return None
            except TimeoutError:
                reason = f"{address} does not answer within {seconds:g} s"
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    return None
                reason = f"{address}: {error.strerror}"
    return reason
