"""Names and addresses of the machines of a run. Whether they lead anywhere is found out before the
processes connect: torch would go on trying."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import time
from contextlib import suppress

from attnres_train.errors import UserError

# The name server of a machine that has just started may be a little late.
TRIES, PAUSE_SECONDS = 3, 2.0
SIOCGIFADDR = 0x8915


def check_master(address: str) -> None:
    """Check that ``address`` of rank 0 leads somewhere from here.

    Raises UserError naming it and this machine.
    """
    for left in reversed(range(TRIES)):
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if getattr(error, "errno", None) != socket.EAI_AGAIN or not left:
                raise UserError(
                    f"MASTER_ADDR is {address!r}, which {socket.gethostname()} cannot resolve "
                    f"({error.strerror}): give rank 0's machine by a name or an IP address that "
                    "every machine of the run knows"
                ) from error
        time.sleep(PAUSE_SECONDS)


def listener(address: str, port: int) -> int:
    """The descriptor of a socket that listens at ``port`` for who comes to ``address``: at no other
    where that is one, on all interfaces where it is a name, which may mean another address here
    than on other machines.

    Raises UserError where the port is taken.
    """
    family, place = socket.AF_INET6, "::"
    with suppress(ValueError):
        found = ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
        family, place = (socket.AF_INET, str(found)) if found.version == 4 else (family, str(found))
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        family, place = socket.AF_INET, "0.0.0.0"
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if place == "::":
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            server.bind((place, port))
        except OSError as error:
            raise UserError(
                f"MASTER_PORT is {port}, where rank 0 cannot listen at {place} "
                f"({error.strerror}): choose a free port, the same on all machines"
            ) from error
        server.listen(4096)
        return server.detach()


def choose_interface(master: str) -> None:
    """Have gloo use the interface that leads to ``master`` where this machine's own name leads to
    no address of its own: gloo would take the loopback interface, where no other machine finds it.
    A choice of the user's (GLOO_SOCKET_IFNAME) is kept.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or _own_name_is_bound():
        return
    if (address := _address_towards(master)) and (name := _interface_of(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _own_name_is_bound() -> bool:
    """Whether this machine's name is that of an address of its own: what gloo looks for."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, place in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind((place[0], 0))
                return True
        except OSError:
            continue
    return False


def _address_towards(master: str) -> str | None:
    """This machine's IPv4 address in what it sends to ``master``. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))
            return probe.getsockname()[0]
    except OSError:
        return None


def _interface_of(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:
                continue  # has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
