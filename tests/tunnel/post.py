"""The way between two WireGuard devices of this host, on which every datagram is handed over one at a time."""

from __future__ import annotations

import socket
from types import TracebackType

INITIATION, RESPONSE, DATA = 1, 2, 4  # the types of WireGuard's messages
INITIATIONS_APART_SECONDS = 0.02  # one that comes sooner after another is not looked at
PATIENCE_SECONDS = 4.0  # WireGuard begins again after five


class Post:
    """Each device has its peer at `ports[n]` of 127.0.0.1, and listens there at `listening[n]`."""

    def __init__(self, *listening: int) -> None:
        self._listening = listening
        self._sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in listening]
        for end in self._sockets:
            end.bind(("127.0.0.1", 0))
            end.settimeout(PATIENCE_SECONDS)
        self.ports = [int(end.getsockname()[1]) for end in self._sockets]

    def __enter__(self) -> Post:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in self._sockets:
            end.close()

    def take(self, number: int) -> bytes:
        """The next datagram of device `number`. Raises TimeoutError when it sends none."""
        return self._sockets[number].recv(2048)

    def hand_over(self, datagram: bytes, number: int) -> None:
        """To the device, which sees it come from its peer."""
        self._sockets[number].sendto(datagram, ("127.0.0.1", self._listening[number]))

    def swap(self) -> list[int]:
        """Both devices have sent something: it crosses. The types of the messages."""
        datagrams = [self.take(0), self.take(1)]
        for number in (0, 1):
            self.hand_over(datagrams[1 - number], number)
        return [datagram[0] for datagram in datagrams]

    def carry(self, number: int) -> int:
        """What device `number` sends next reaches the other one. The type of the message."""
        datagram = self.take(number)
        self.hand_over(datagram, 1 - number)
        return datagram[0]
