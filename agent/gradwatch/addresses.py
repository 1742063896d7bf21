"""Addresses: whether others reach one, and whether a port at it can be had."""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.parse

__all__ = ["is_loopback", "scrapable", "why_not_bound"]

_HOST = r"[\w.-]+|\[[0-9a-fA-F:.]+(%[\w.-]+)?\]"


def is_loopback(address: str) -> bool:
    """Whether this machine alone reaches what is bound to it."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def why_not_bound(address: str, port: int) -> str | None:
    """Why a server cannot have that port, in the system's words; None where it can."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.strerror or str(error)
        except (ValueError, OverflowError) as error:  # no host's name; no port
            return str(error)
    return None


def scrapable(text: str) -> urllib.parse.SplitResult | None:
    """The URL of an exporter, http or https; None of a text that is none."""
    try:
        url = urllib.parse.urlsplit(text)
        port = url.port
    except ValueError:  # brackets that do not match, a port that is no number
        return None
    named = re.fullmatch(rf"({_HOST})(:\d+)?", url.netloc) is not None
    good = url.scheme in {"http", "https"} and named and port != 0 and text.isprintable()
    return url if good else None
