"""Addresses: whether others reach one, and whether a port at it can be had."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["is_loopback", "why_not_bound"]


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
    return None
