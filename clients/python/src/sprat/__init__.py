"""A client for sprat networks: join, list, search, watch, download from several peers at once, share.

    from sprat import Network, join

    join("sprat://192.0.2.10:7700/…", "me")
    with Network.open("me") as network:
        for file in network.list("models/**"):
            print(file.size, file.name)
        network.download("models/small.gguf", "downloads/")

The generated messages and stubs of the whole protocol are in `sprat.v1`.
"""

from sprat.download import Downloaded, Progress
from sprat.enroll import join, renew
from sprat.errors import (
    Ambiguous,
    CallError,
    LinkError,
    NotFound,
    NotWhole,
    SpratError,
    Unavailable,
    Untrusted,
)
from sprat.identity import Identity, Link
from sprat.network import Change, File, Network, Source
from sprat.share import Share

__all__ = [
    "Ambiguous",
    "CallError",
    "Change",
    "Downloaded",
    "File",
    "Identity",
    "Link",
    "LinkError",
    "Network",
    "NotFound",
    "NotWhole",
    "Progress",
    "Share",
    "Source",
    "SpratError",
    "Unavailable",
    "Untrusted",
    "join",
    "renew",
]
