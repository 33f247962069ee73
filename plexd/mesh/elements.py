"""Elements of nftables sets: keys as the kernel has them, compact and quick to compare, and their form in JSON.

Ten thousand of them change one at a time; what is worked out for all of them is therefore kept, and amended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plexd.mesh.address import format_ip, parse_ip
from plexd.mesh.sharing import Shared, differing, with_changes

Json = dict[str, Any]

_SIZES = {"ipv4_addr": 4, "ipv6_addr": 16, "inet_service": 2, "inet_proto": 1}
_REGISTER = 4  # bytes: where several fields make a key, each fills whole ones of these
_MODULUS = 1 << 256


def join(fields: Sequence[bytes]) -> bytes:
    """The key that these fields make."""
    return fields[0] if len(fields) == 1 else b"".join(field + bytes(-len(field) % _REGISTER) for field in fields)


@dataclass(frozen=True, slots=True)
class Elements:
    """All of a set: its comment, or "", by the key of each. `types` are those of the fields.

    `counted` ones have a counter each. `checksum` tells sets apart: it is the sum of the digests of all, so that it can
    be amended.
    """

    types: tuple[str, ...]
    held: Mapping[bytes, str] = field(repr=False)
    counted: bool
    checksum: int

    @classmethod
    def of(cls, types: tuple[str, ...], held: Mapping[bytes, str], *, counted: bool = False) -> Elements:
        return cls(types, Shared(held), counted, sum(_digest(key, comment) for key, comment in held.items()) % _MODULUS)

    def amended(self, removed: Iterable[bytes], added: Mapping[bytes, str]) -> Elements:
        """Without the ones and with the others; itself if that changes nothing."""
        taken = {key: self.held[key] for key in removed if key in self.held and key not in added}
        new = {key: comment for key, comment in added.items() if key not in self.held}
        if not taken and not new:
            return self
        held = with_changes(self.held, new, gone=taken)
        difference = sum(_digest(*each) for each in new.items()) - sum(_digest(*each) for each in taken.items())
        return Elements(self.types, held, self.counted, (self.checksum + difference) % _MODULUS)

    def difference(self, after: Elements) -> tuple[Sequence[bytes], Mapping[bytes, str]]:
        """What to take out of these, and then to put in, so that they become `after`."""
        if self.checksum == after.checksum:
            return (), {}
        touched = differing(self.held, after.held)
        return [key for key in touched if key in self.held], {k: after.held[k] for k in touched if k in after.held}

    def to_json(self) -> list[Any]:
        """As nft takes them, in one order."""
        if not self.counted:
            return [self._value(key) for key in sorted(self.held)]
        return [
            {"elem": {"val": self._value(key), **({"comment": comment} if comment else {})}}
            for key, comment in sorted(self.held.items())
        ]

    def are_in(self, told: Sequence[Any]) -> bool:
        """Whether what nft tells of a set, with numbers for protocols, is exactly these, whatever they counted."""
        if len(told) != len(self.held):
            return False
        try:
            seen = dict(map(self._read, told))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # what we never wrote
            return False
        return seen == self.held

    def _value(self, key: bytes) -> Any:
        values: list[str | int] = []
        for type_ in self.types:
            size = _SIZES[type_]
            value, key = key[:size], key[size + -size % _REGISTER :]
            values.append(format_ip(value) if type_.endswith("addr") else int.from_bytes(value, "big"))
        return values[0] if len(values) == 1 else {"concat": values}

    def _read(self, told: Any) -> tuple[bytes, str]:
        marked = told["elem"] if isinstance(told, dict) and "elem" in told else {"val": told}
        if not marked.keys() <= {"val", "comment", "counter"} or ("counter" in marked) != self.counted:
            raise ValueError("not one of these")
        value = marked["val"]
        values = [value] if len(self.types) == 1 else value["concat"]
        fields = [
            parse_ip(each) if type_.endswith("addr") else each.to_bytes(_SIZES[type_], "big")
            for type_, each in zip(self.types, values, strict=True)
        ]
        return join(fields), marked.get("comment", "")


def _digest(key: bytes, comment: str) -> int:
    return int.from_bytes(hashlib.sha256(key + comment.encode()).digest(), "big")
