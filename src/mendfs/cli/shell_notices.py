"""What the shell says when a server is lost or back. Pure."""

from mendfs.client.watch import Reach


def notices(before: Reach | None, after: Reach, meta: str) -> list[str]:
    """One line for each server that came or went; at first, for each that is not there. `meta` is its address."""
    lines: list[str] = []
    was_there = before is None or before.meta
    if was_there and not after.meta:
        lines.append(f"Connection lost to the meta server at {meta}: commands wait until it is back")
    elif not was_there and after.meta:
        lines.append(f"The meta server at {meta} is back")
    for number, is_up in sorted(after.servers.items()):
        address = after.addresses[number]
        was_up = True if before is None else before.servers.get(number, is_up)
        if before is None and not is_up:
            lines.append(f"No connection to server {number} at {address}")
        elif was_up and not is_up:
            lines.append(f"Connection lost to server {number} at {address}")
        elif is_up and not was_up:
            lines.append(f"Server {number} at {address} is back")
    return lines
