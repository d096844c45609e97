"""Names that cross the wire: harmless, or refused; never repaired."""

from __future__ import annotations

import re
import unicodedata

from sprat.errors import Untrusted

# They act on a terminal, turn text around, or make two names look alike.
_FORBIDDEN = re.compile(
    r"[\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u200b\u2060-\u2065\u206a-\u206f\ufeff\u180e"
    r"\u2028\u2029\ufff9-\ufffb]"
)


def safe_name(text: str) -> str:
    """The name in Unicode's NFC form; raises `Untrusted` if it breaks a rule, such as leaving its folder."""
    name = unicodedata.normalize("NFC", text)
    try:
        parts = [part.encode() for part in name.split("/")]
    except UnicodeEncodeError:
        raise Untrusted(f"{text!r} is not UTF-8") from None
    if sum(map(len, parts)) + len(parts) - 1 > 1024 or len(parts) > 32 or max(map(len, parts)) > 255:
        raise Untrusted(f"the name {text[:80]!r} is too long")
    if any(part in (b"", b".", b"..", b".sprat") for part in parts) or name.endswith(".part"):
        raise Untrusted(f"{text!r} is not a name that may be used")
    if _FORBIDDEN.search(name):
        raise Untrusted(f"{text!r} has a forbidden character")
    return name
