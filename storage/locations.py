"""Locations. A location is a local path or a URI (`s3://bucket/runs/mine`); a URI's files have a copy on each node.

This file handles strings and paths only. `storage.objects` reads and writes.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path


def is_uri(location: str) -> bool:
    return "://" in location


def join(location: str, *names: str) -> str:
    """The path of `names` below a location. A URI's query stays at its end."""
    if not is_uri(location):
        return str(Path(location, *names))
    place, mark, query = location.partition("?")
    return "/".join([place.rstrip("/"), *names]) + mark + query


def check_uri(uri: str) -> None:
    """ValueError if it can't be the URI of a folder. The storage isn't contacted."""
    match = re.fullmatch(r"[a-z][a-z0-9+.-]*://([^?#]*)(\?[^#]*)?", uri)
    if not match or not match[1].strip("/"):
        raise ValueError(f"{uri!r} is no URI of a folder, such as s3://bucket/runs/mine")
    if "@" in match[1]:
        raise ValueError(
            "credentials don't belong in a URI, which is shown and stored: use the environment (AWS_ACCESS_KEY_ID …), "
            "~/.aws/credentials or the node's role"
        )
    if match[1].split("/")[-1] == "" or ".." in match[1].split("/"):
        raise ValueError(f"{uri!r}: write it without a slash at the end and without '..'")


def local_path(location: str) -> Path:
    """Where a location is on this node: a path is itself; a URI's copy is below `$XDG_CACHE_HOME/autotraj` (else
    `~/.cache/autotraj`), which must have room for it."""
    if not is_uri(location):
        return Path(location)
    scheme, _, rest = location.partition("://")
    place, _, query = rest.partition("?")
    if query:  # another endpoint may have a bucket of the same name
        scheme += "-" + hashlib.sha256(query.encode()).hexdigest()[:8]
    return cache() / scheme / place


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autotraj"
