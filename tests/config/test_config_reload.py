"""What a changed configuration changes at once, and what waits for a restart."""

from __future__ import annotations

from plexd.config.models import Config
from plexd.config.reload import take_over

LIVE = {"log_level", "heartbeat", "mesh.mtu", "nat_traversal"}
OLD = Config.model_validate({"api": "https://a.example", "mesh": {"mtu": 1400, "listen_port": 1}})


def test_live_keys_change_and_others_wait() -> None:
    new = Config.model_validate(
        {
            "api": "https://b.example",
            "log_level": "debug",
            "heartbeat": {"interval": "10s"},
            "mesh": {"mtu": 1300, "listen_port": 2},
            "nat_traversal": {"stun_servers": ("192.0.2.1:3478",)},
            "token": {"value": "t"},
        }
    )
    reloaded = take_over(OLD, new, LIVE)
    assert set(reloaded.changed) == {"log_level", "heartbeat.interval", "mesh.mtu", "nat_traversal.stun_servers"}
    assert set(reloaded.restart_required) == {"api", "mesh.listen_port", "token.value"}
    merged = reloaded.config
    assert (merged.log_level, merged.mesh.mtu, merged.heartbeat) == ("debug", 1300, new.heartbeat)
    assert (merged.api, merged.mesh.listen_port, merged.token) == (OLD.api, 1, OLD.token)
    # what waits is told again at the next reload
    assert take_over(merged, new, LIVE) == (merged, (), reloaded.restart_required)


def test_same_configuration_changes_nothing() -> None:
    assert take_over(OLD, OLD.model_copy(), LIVE) == (OLD, (), ())


def test_key_is_not_live_because_another_begins_like_it() -> None:
    new = OLD.model_copy(update={"mesh": OLD.mesh.model_copy(update={"mtu": 0})})
    assert take_over(OLD, new, {"mesh.mt"}).restart_required == ("mesh.mtu",)
