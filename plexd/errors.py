"""The errors of plexd, named for what the caller can do next.

PlexdError
├── FatalError                 the process ends with `exit_code`; the message says what to do
│   ├── ConfigError            5   correct the configuration
│   ├── RegistrationRefused    6   put a usable bootstrap token in place
│   ├── LocalStateError        7   repair the data directory, or stop the other daemon
│   ├── RegistrationTimedOut   8   start again later
│   ├── PrivilegeError         9   run as root
│   └── ListenerError          1   free the place where the API socket belongs
├── ControlError               a call to the control plane failed (docs/contract/wire.md §4)
│   ├── Transient              try again by the retry policy of the endpoint
│   │   ├── RateLimited        try again, not before `retry_after`
│   │   └── Misconfigured      like Transient; the base URL answers with a redirect
│   ├── Unauthenticated        the identity is refused; deliveries pause
│   ├── Forbidden              no immediate retry
│   ├── NotFound               no such thing, or the control plane lacks the call
│   ├── Conflict               it stands otherwise at the control plane
│   ├── TooLarge               send less at a time
│   └── Rejected               never send the same body again
├── WireError                  a document or event is not what the contract says; nothing of it is used
├── Unresolved                 a name has no address now; ask again later
├── StunError                  a STUN server gave no usable answer; ask another one
├── TooManyTemporaryAllows                  all service temporary_allows are in use; close one
└── KernelError                the kernel, or a program in its place, refused
    ├── BackendUnavailable     neither WireGuard back end works here; `causes` says why, and what to install
    ├── PortInUse              another program holds the listen port
    ├── FirewallUnavailable    no filter table can be had here; the message says what to install
    ├── PolicyRejected         this filter table cannot be had; the one before stays in force
    ├── NotPermitted           a capability is missing
    ├── NotAddressable         no interface of this host can have the mesh address; the message says what to switch on
    └── ForeignLink            a link of our name belongs to somebody else; it is never touched
"""

from __future__ import annotations

from typing import NamedTuple

QUOTED_CHARACTERS = 200


class PlexdError(Exception):
    """Root of the tree; raise one of its leaves."""


class FatalError(PlexdError):
    """Ends the process. The message is one sentence that says what to do."""

    exit_code = 1


class ConfigError(FatalError):
    """The configuration is missing, unreadable or invalid; `problems` has one line for each mistake."""

    exit_code = 5

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RegistrationRefused(FatalError):
    exit_code = 6


class LocalStateError(FatalError):
    exit_code = 7


class RegistrationTimedOut(FatalError):
    exit_code = 8


class PrivilegeError(FatalError):
    exit_code = 9


class ListenerError(FatalError):
    """A socket could not be opened. systemd may try again."""


class ControlError(PlexdError):
    """A call to the control plane failed.

    `status` is the HTTP status, None when no answer came; `retry_after` is in seconds, already clamped;
    `body` is the start of the answer's text. What it begins with is part of the message: it is where a control plane
    says what it does not like.
    """

    def __init__(
        self, message: str, *, status: int | None = None, retry_after: float | None = None, body: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.body = body

    def __str__(self) -> str:
        said = " ".join(self.body.split())
        return ": ".join(filter(None, (super().__str__(), said[:QUOTED_CHARACTERS])))


class Transient(ControlError):
    pass


class RateLimited(Transient):
    pass


class Misconfigured(Transient):
    pass


class Unauthenticated(ControlError):
    pass


class Forbidden(ControlError):
    pass


class NotFound(ControlError):
    pass


class Conflict(ControlError):
    pass


class TooLarge(ControlError):
    pass


class Rejected(ControlError):
    pass


class WireError(PlexdError):
    """What arrived is not what the contract says. The message names the place, never a secret."""


class Unresolved(PlexdError):
    pass


class StunError(PlexdError):
    pass


class TooManyTemporaryAllows(PlexdError):
    pass


class KernelError(PlexdError):
    """The kernel refused. The message carries no key material."""


class BackendUnavailable(KernelError):
    def __init__(self, *causes: str) -> None:
        super().__init__("; ".join(causes))
        self.causes = causes


class FirewallUnavailable(KernelError):
    pass


class PolicyRejected(KernelError):
    pass


class PortInUse(KernelError):
    pass


class NotPermitted(KernelError):
    pass


class NotAddressable(KernelError):
    pass


class ForeignLink(KernelError):
    pass


class Problem(NamedTuple):
    """What a check finds wrong with this machine. It is a result, not an exception.

    `check` is a stable word for what was examined; `cause` and `remedy` are sentences for people.
    """

    check: str
    cause: str
    remedy: str
