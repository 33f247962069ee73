"""A TCP conversation to judge a policy by: `answer PORT…` echoes what it is told, `talk ADDRESS PORT` keeps talking.

Run as a program in a node's namespace. The talker prints `no answer`, or `connected` once it had a few, and at the end
how many it had before one failed to come.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time

PATIENCE_SECONDS = 1.0
PAUSE_SECONDS = 0.05
A_FEW = 5


def answer(*ports: str) -> int:
    """Until it is killed."""
    waiting = selectors.DefaultSelector()
    for port in ports:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", int(port)), family=family, dualstack_ipv6=both)
        waiting.register(listener, selectors.EVENT_READ, True)
    print("listening", flush=True)
    while True:
        for key, _ in waiting.select():
            sock, is_listener = key.fileobj, key.data
            assert isinstance(sock, socket.socket)  # noqa: S101 - nothing else is registered
            if is_listener:
                waiting.register(sock.accept()[0], selectors.EVENT_READ, False)
            elif not _echo(sock):
                waiting.unregister(sock)
                sock.close()


def _echo(sock: socket.socket) -> bool:
    """Whether there is still somebody to talk to."""
    try:
        words = sock.recv(1024)
        sock.sendall(words)
    except OSError:  # given up at the other end
        return False
    return bool(words)


def talk(address: str, port: str) -> int:
    try:
        sock = socket.create_connection((address, int(port)), timeout=PATIENCE_SECONDS)
    except OSError:
        print("no answer", flush=True)
        return 1
    answers = 0
    with sock:
        try:
            while True:
                sock.sendall(b"x")
                if not sock.recv(1024):
                    break
                answers += 1
                if answers == A_FEW:
                    print("connected", flush=True)
                time.sleep(PAUSE_SECONDS)
        except OSError:
            pass
    print(f"silent after {answers} answers", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(answer(*sys.argv[2:]) if sys.argv[1] == "answer" else talk(*sys.argv[2:]))
