"""Which sockets a process listens on, as Linux tells."""

import contextlib
import os
import pathlib

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, ::1


def listening(pid: int) -> list[tuple[str, int]]:
    """(local address in hexadecimal, port) of the TCP sockets on which a process listens."""
    inodes = set()
    for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(path).removeprefix("socket:[").removesuffix("]"))
    tables = [pathlib.Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    places = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in inodes]
    return [(address, int(port, 16)) for address, port in places]
