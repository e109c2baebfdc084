"""The seam to the operating system: everything that is neither arithmetic nor the event loop's time comes in here.

Production code takes a `World`, or the part of it that it needs, as an argument; simulation hands in another one. This
package is the only place that opens files, sockets or processes (`kv/rocks.py` and `fuse/device.py` are the two
named exceptions).
"""

import os
import random
import time
from collections.abc import Callable

import msgspec

from mendfs.world.disk import Disk
from mendfs.world.network import Network


class World(msgspec.Struct, frozen=True):
    """What a server or client is given of the outside."""

    network: Network
    disk: Disk
    rng: random.Random
    now_ns: Callable[[], int]
    """Wall clock for the times that files carry, in nanoseconds since 1970. Durations are the event loop's."""
    pid: int = 0
    """This process's number, for people: `status` shows it."""


def real_world() -> World:
    """The machine itself."""
    from mendfs.world.local_disk import LocalDisk
    from mendfs.world.tcp import TcpNetwork

    return World(TcpNetwork(), LocalDisk(), random.SystemRandom(), time.time_ns, os.getpid())
