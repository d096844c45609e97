"""Connections: TLS to whoever holds a certificate of the network under the expected name, and to nobody else."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable, Sequence

import grpc

from sprat.errors import Unavailable
from sprat.identity import DOMAIN, Identity

JOIN_NAME = f"join.{DOMAIN}"
TRACKER_NAME = f"tracker.{DOMAIN}"
MAX_MESSAGE = (1 << 20) + (64 << 10)
"""Longest message of any service, in bytes: a chunk and its frame."""
DIAL_SECONDS = 10.0


def peer_name(peer_id: str) -> str:
    """The name that a peer's certificate must carry."""
    return f"{peer_id}.peer.{DOMAIN}"


def target(address: str) -> str:
    """An address, which may come from a stranger, as gRPC reads it: never as a path or another scheme."""
    if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+(%\w+)?\]|[\w.-]+):\d{1,5}", address, re.ASCII):
        raise Unavailable(f"{address!r} is no HOST:PORT")
    return f"dns:///{address}"


def open_channel(address: str, name: str, authority: bytes, member: Identity | None = None) -> grpc.Channel:
    """A connection, not yet made, to the holder of the certificate `name` from `authority` (PEM), at `address`.

    gRPC checks the certificate during the handshake: before that nothing of ours is sent. It is mutual if `member` is
    given.
    """
    own = (member.key, member.certificate) if member else (None, None)
    options = [
        ("grpc.ssl_target_name_override", name),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.http2.max_frame_size", 256 << 10),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 500),
    ]
    return grpc.secure_channel(target(address), grpc.ssl_channel_credentials(authority, *own), options)


def dial(
    addresses: Sequence[str], name: str, member: Identity, stopped: Callable[[], bool] = lambda: False
) -> grpc.Channel:
    """Tries all addresses side by side; the answer is the first connection where `name` was proven."""
    deadline = time.monotonic() + DIAL_SECONDS
    answers: queue.SimpleQueue[tuple[grpc.Channel, bool]] = queue.SimpleQueue()
    channels: dict[grpc.Channel, Callable[[grpc.ChannelConnectivity], None]] = {}
    won: grpc.Channel | None = None
    failed: set[grpc.Channel] = set()
    try:
        for address in list(dict.fromkeys(addresses))[:16]:
            try:
                channel = open_channel(address, name, member.authority, member)
            except Unavailable:
                continue
            callback = _report(channel, answers)
            channels[channel] = callback
            channel.subscribe(callback, try_to_connect=True)
        while won is None and len(failed) < len(channels) and time.monotonic() < deadline and not stopped():
            try:
                channel, ready = answers.get(timeout=0.1)
            except queue.Empty:
                continue
            if ready:
                won = channel
                channel.unsubscribe(channels[channel])
            else:
                failed.add(channel)
    finally:
        for channel in channels:
            if channel is not won:
                channel.close()
    if won is None:
        raise Unavailable(f"{name} is at none of its addresses, or refuses this member")
    return won


def _report(
    channel: grpc.Channel, answers: queue.SimpleQueue[tuple[grpc.Channel, bool]]
) -> Callable[[grpc.ChannelConnectivity], None]:
    def changed(state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            answers.put((channel, True))
        elif state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            answers.put((channel, False))

    return changed
