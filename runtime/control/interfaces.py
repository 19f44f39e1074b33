"""Where a run's processes listen: on the loopback address if all are on one machine, else on the one interface through
which they meet."""

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

from unlocked.runtime.control.world import World

__all__ = ["choose_interfaces", "listening_host", "meeting_host", "own_address"]

_SIOCGIFADDR = 0x8915  # netdevice(7)


def meeting_host(world: World) -> str:
    """Rank 0's machine, as every process of the run calls it."""
    return _loopback(world) if world.is_local else world.master_address


def listening_host(world: World) -> str:
    """The address of its own at which rank 0 listens; "" (every interface) where MASTER_ADDR is none of this machine's,
    as behind an address translation."""
    if world.is_local:
        return _loopback(world)
    return next((address for address in _addresses(world) if _is_own(address)), "")


def choose_interfaces(world: World) -> None:
    """Has the process groups of Gloo and NCCL use the interface through which this process reaches rank 0, where the
    user has not named one. They would take the one that this machine's name belongs to, if it belongs to any."""
    if world.is_local:
        name = "lo0" if sys.platform == "darwin" else "lo"
    else:
        name = next((found for address in _addresses(world) if (found := _interface_towards(address))), "")
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this one, and none that begins so


def own_address(world: World) -> str:
    """The address of this machine's own that it would speak to rank 0 from; its name where it can't tell."""
    for address in _addresses(world):
        with contextlib.suppress(OSError), _towards(address) as probe:
            return str(probe.getsockname()[0]).partition("%")[0]
    return socket.gethostname()


def _loopback(world: World) -> str:
    """IPv4's, unless MASTER_ADDR has IPv6 only."""
    with contextlib.suppress(OSError):
        families = {one[0] for one in socket.getaddrinfo(world.master_address, None, type=socket.SOCK_STREAM)}
        if families == {socket.AF_INET6}:
            return "::1"
    return "127.0.0.1"


def _addresses(world: World) -> list[str]:
    """MASTER_ADDR's, without those that mean another machine on every machine."""
    try:
        found = socket.getaddrinfo(world.master_address, world.master_port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = [str(one[4][0]) for one in found]
    return [address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]


def _is_own(address: str) -> bool:
    family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def _interface_towards(address: str) -> str | None:
    """The name of the interface whose own address this machine would speak to `address` from."""
    try:
        with _towards(address) as probe:
            own = probe.getsockname()[0].partition("%")[0]
            return _named_v6(own) if probe.family == socket.AF_INET6 else _named_v4(probe, own)
    except OSError:
        return None


def _towards(address: str) -> socket.socket:
    """A socket that has chosen its own address.

    Raises:
        OSError: there is no way.
    """
    family, kind, protocol, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    probe = socket.socket(family, kind, protocol)
    try:
        probe.connect(place)  # sends nothing: the kernel looks for the way
    except OSError:
        probe.close()
        raise
    return probe


def _named_v4(probe: socket.socket, own: str) -> str | None:
    if sys.platform != "linux":
        return None
    import fcntl

    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):  # it has no address
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def _named_v6(own: str) -> str | None:
    wanted = ipaddress.ip_address(own)
    table = Path("/proc/net/if_inet6")  # proc(5): address, number, length, scope, flags, name
    for line in table.read_text().splitlines() if table.exists() else ():
        address, *_, name = line.split()
        if ipaddress.ip_address(bytes.fromhex(address)) == wanted:
            return name
    return None
