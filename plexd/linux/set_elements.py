"""Changes of nftables sets as the one batch of messages that the kernel carries out whole or not at all.

The program nft takes 3 ms for it, and looks at everybody's tables first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from plexd.linux.netlink import NESTED, NLM_F_CREATE, NLM_F_EXCL, Message, attribute
from plexd.mesh.firewall import SetChange

NFNL_SUBSYS_NFTABLES = 10
NFPROTO_UNSPEC, NFPROTO_INET = 0, 1
NFGENMSG = struct.Struct(">BBH")  # family, version, resource

_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END = 16, 17
_NFNL_BATCH_GENID = 1
_NFT_MSG_NEWSETELEM, _NFT_MSG_DELSETELEM = (NFNL_SUBSYS_NFTABLES << 8 | kind for kind in (12, 14))
_NFTA_SET_ELEM_LIST_TABLE, _NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
_NFTA_LIST_ELEM = 1
_NFTA_SET_ELEM_KEY, _NFTA_SET_ELEM_USERDATA = 1, 6
_NFTA_DATA_VALUE = 1
_UDATA_COMMENT = 0  # as nft keeps it: type, length, text ended by a zero


class Batch(NamedTuple):
    begin: Message
    messages: Sequence[Message]
    end: Message


def batch(table: str, changes: Iterable[SetChange], generation: int | None) -> Batch:
    """The messages that change elements of sets of a table.

    With a generation the kernel refuses the batch when the rule set is another one by then (ERESTART).

    It also refuses to add an element that is there, or to remove one that is not. Elements of sets with counters get
    their counter without being asked for.
    """
    frame = NFGENMSG.pack(NFPROTO_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
    number = b"" if generation is None else attribute(_NFNL_BATCH_GENID, generation.to_bytes(4, "big"))
    messages: list[Message] = []
    for change in changes:
        # in this order: one with a new comment goes before it comes
        if change.removed:
            elements = [_element(key, "") for key in change.removed]
            messages.append(Message(_NFT_MSG_DELSETELEM, 0, _payload(table, change.name, elements)))
        if change.added:
            elements = [_element(key, comment) for key, comment in change.added.items()]
            messages.append(
                Message(_NFT_MSG_NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, _payload(table, change.name, elements))
            )
    begin, end = (Message(kind, 0, frame) for kind in (_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END))
    return Batch(begin._replace(payload=frame + number), messages, end)


def _payload(table: str, name: str, elements: Iterable[bytes]) -> bytes:
    return (
        NFGENMSG.pack(NFPROTO_INET, 0, 0)
        + attribute(_NFTA_SET_ELEM_LIST_TABLE, table.encode() + b"\0")
        + attribute(_NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0")
        + attribute(_NFTA_SET_ELEM_LIST_ELEMENTS | NESTED, b"".join(elements))
    )


def _element(key: bytes, comment: str) -> bytes:
    content = attribute(_NFTA_SET_ELEM_KEY | NESTED, attribute(_NFTA_DATA_VALUE, key))
    if comment:
        text = comment.encode() + b"\0"
        content += attribute(_NFTA_SET_ELEM_USERDATA, bytes([_UDATA_COMMENT, len(text)]) + text)
    return attribute(_NFTA_LIST_ELEM | NESTED, content)
