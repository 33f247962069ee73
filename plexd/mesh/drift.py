"""The corrections that a pass reports to the control plane, named as in docs/contract/mesh.md §5.4.

A correction never holds key material, and a change that an event announced is no correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    CreateLink,
    DeleteLink,
    Outcome,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RemoveTable,
    RenewSessions,
    ReplaceTable,
    SetAlias,
    SetDevice,
    SetDown,
    SetMtu,
    SetUp,
    Subject,
)
from plexd.mesh.desired import Desired, Rejection
from plexd.mesh.keys import PublicKey
from plexd.mesh.policy import faults


class Correction(NamedTuple):
    type: str
    detail: str


def pass_corrections(
    subject: Subject, outcomes: Iterable[Outcome], known_ids: Mapping[PublicKey, str], known_table: str | None = None
) -> tuple[Correction, ...]:
    """What a pass repaired of `subject`. An interface that was created anew is one correction with counts.

    `known_ids` names peers by public key as they were wanted until now, so that a withdrawn peer is not a stranger.
    `known_table` is the digest of the ruleset wanted until now: another digest is a change of policies, no repair.
    """
    done = [outcome.change for outcome in outcomes if outcome.error is None]
    table = tuple(
        Correction("firewall_repaired", subject.table)
        for change in done
        if isinstance(change, ReplaceTable) and change.ruleset.digest == known_table
    )
    if any(isinstance(change, CreateLink) for change in done):
        peers = sum(isinstance(change, PutPeer) for change in done)
        routes = sum(isinstance(change, AddRoute) for change in done)
        anew = f"{subject.interface}: link, {peers} peers, {routes} routes"
        return (*table, Correction("interface_repaired", anew))
    repaired: dict[str, None] = {}
    corrections: list[Correction] = []
    for change in done:
        match change:
            case SetAlias():
                repaired["alias"] = None
            case SetDevice():
                repaired.update(dict.fromkeys(change.fields))
            case AddAddress() | RemoveAddress():
                repaired["address"] = None
            case SetMtu():
                repaired["mtu"] = None
            case SetUp():
                repaired["up"] = None
            case DeleteLink():
                repaired["link"] = None
            case RemovePeer(peer_id, public_key):
                known = peer_id or known_ids.get(public_key)
                name = f"peer {known}" if known else f"peer key {public_key.short}"
                corrections.append(Correction("peer_removed", name))
            case PutPeer(peer_id, is_new=True):
                corrections.append(Correction("peer_added", f"peer {peer_id}"))
            case PutPeer(peer_id):
                corrections.append(Correction("peer_updated", f"peer {peer_id}: {', '.join(change.fields)}"))
            case AddRoute(route):
                corrections.append(Correction("route_added", str(route.prefix)))
            case RemoveRoute(route):
                corrections.append(Correction("route_removed", str(route.prefix)))
            case CreateLink() | ReplaceTable() | RemoveTable() | SetDown() | RenewSessions():
                pass  # reported above, or no repair
    if repaired:
        corrections.insert(0, Correction("interface_repaired", f"{subject.interface}: {', '.join(repaired)}"))
    return (*table, *corrections)


def snapshot_corrections(before: Desired, after: Desired) -> tuple[Correction, ...]:
    """What a state pull changed, apart from peers: those show in the corrections of the pass."""
    return tuple(_snapshot_corrections(before, after))


def _snapshot_corrections(before: Desired, after: Desired) -> Iterator[Correction]:
    if before.signing_keys != after.signing_keys:
        yield Correction("signing_keys_updated", "signing keys rotated")
    old_policies = {policy.id: policy for policy in before.policies}
    new_policies = {policy.id: policy for policy in after.policies}
    for policy_id in old_policies:
        if policy_id not in new_policies:
            yield Correction("policy_removed", f"policy {policy_id}")
    for policy_id, policy in new_policies.items():
        if policy_id not in old_policies:
            yield Correction("policy_added", f"policy {policy_id}")
        elif old_policies[policy_id] != policy:
            yield Correction("policy_updated", f"policy {policy_id}")
    if before.policies != after.policies:
        known_faults = set(faults(before.policies))
        for fault in faults(after.policies):
            if fault not in known_faults:
                yield Correction("policy_rule_invalid", str(fault))
    if before.metadata != after.metadata:
        yield Correction("metadata_updated", f"metadata updated: {_differing(before.metadata, after.metadata)} entries")
    if before.data != after.data:
        yield Correction("data_updated", f"data updated: {_differing(before.data, after.data)} entries")
    if before.secret_refs != after.secret_refs:
        count = _differing(before.secret_refs, after.secret_refs)
        yield Correction("secret_refs_updated", f"secret refs updated: {count} entries")
    for rejection in after.rejected:
        if rejection not in before.rejected:
            yield rejection_correction(rejection)


def rejection_correction(rejection: Rejection) -> Correction:
    return Correction("peer_rejected", f"peer {rejection.peer_id}: {rejection.reason}")


def _differing(before: Mapping[str, object], after: Mapping[str, object]) -> int:
    return sum(before.get(key) != after.get(key) or (key in before) != (key in after) for key in before.keys() | after)
