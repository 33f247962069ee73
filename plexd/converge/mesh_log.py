"""What the log and health say of a pass over the mesh."""

from __future__ import annotations

from collections.abc import Sequence

from plexd.errors import ForeignLink, KernelError, NotAddressable, NotPermitted
from plexd.log import get_logger
from plexd.mesh.changes import Change, CreateLink, Outcome, PutPeer, RemovePeer, ReplaceTable, Subject
from plexd.mesh.repair_limiter import leaves_table

log = get_logger("mesh")

_NO_MESH = (ForeignLink, NotAddressable, NotPermitted)  # errors of a look where there can be no mesh


def log_failed_pass(subject: Subject, error: KernelError, *, is_up: bool, is_news: bool) -> bool:
    """Whether the mesh is down by this error. A mesh that could only not be looked at is as it was last seen."""
    is_down = isinstance(error, _NO_MESH) or not is_up
    write = log.error if is_news else log.debug
    write("mesh failed" if is_down else "mesh not looked at", interface=subject.interface, error=str(error))
    return is_down


def log_peers(done: Sequence[Change], peers: int) -> None:
    """One line sums up the peers that changed; `peers` is how many there are now."""
    changed = [change for change in done if isinstance(change, PutPeer | RemovePeer)]
    if not changed:
        return
    # a silent peer gets another endpoint twice a minute
    is_move = all(isinstance(change, PutPeer) and change.fields == ("endpoint",) for change in changed)
    write = log.debug if is_move else log.info
    write(
        "peers changed",
        added=sum(isinstance(change, PutPeer) and change.is_new for change in changed),
        removed=sum(isinstance(change, RemovePeer) for change in changed),
        updated=sum(isinstance(change, PutPeer) and not change.is_new for change in changed),
        peers=peers,
    )


def why_down(
    interface: str, due: Sequence[Change], changes: Sequence[Change], outcomes: Sequence[Outcome]
) -> str | None:
    """Why there is no interface after a pass, or none that may carry anything; None when there is one.

    `due` are the changes that the look asked for, `changes` those that were applied.
    """
    tables = [outcome.error for outcome in outcomes if isinstance(outcome.change, ReplaceTable)]
    if len(tables) > 1 and tables[-1] is not None:  # neither the wanted table nor the baseline
        return tables[-1]
    if leaves_table(due, changes):
        return f"another program keeps changing the firewall: {interface} is down until it may be repaired again"
    for outcome in outcomes:
        if isinstance(outcome.change, CreateLink):
            return outcome.error
    if not changes and any(isinstance(change, CreateLink) for change in due):
        return f"another program keeps deleting {interface}"
    return None
