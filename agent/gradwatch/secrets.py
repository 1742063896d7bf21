"""Store URLs without their secrets: fit for a log, an error or a page.

What cannot be told apart for sure is hidden whole.
"""

from __future__ import annotations

import itertools
import re
import urllib.parse

__all__ = ["quoted", "redact", "scrub"]

_HIDDEN = "***"
# Parameters of a URL that are no secret: shown with their value.
_PLAIN = frozenset(
    [
        "application_name",
        "channel_binding",
        "client_encoding",
        "connect_timeout",
        "dbname",
        "host",
        "hostaddr",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "mode",
        "port",
        "service",
        "sslmode",
        "target_session_attrs",
        "tcp_user_timeout",
        "timeout",
        "user",
    ]
)
# Those known to be secret, or to lead to one: their name is shown, and means nothing.
_SECRET = ("options", "passfile", "password", "sslcert", "sslkey", "sslpassword")
_LEAST = 4  # a shorter piece of a secret is not looked for in a text: other words hold it too
_HOST = r"(\[[^\]@]*\]|[^@/?#\s:,\[\]]*)(:\d{1,5})?"
_SHAPE = re.compile(
    rf"((?P<user>[^:/@?#]*)(:(?P<password>.*))?@)?"
    rf"(?P<host>{_HOST}(,{_HOST})*)(?P<path>/[^@:]*)?",
    re.DOTALL,
)
_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*")
_NAME = re.compile(rf"(?:^|&)(?:{'|'.join([*_PLAIN, *_SECRET])})=")
_PAIR = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|[^\s']\S*)(?=\s|$)")


def redact(url: str) -> str:
    """The URL with *** for its password, and from the first parameter not known to be harmless."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _hide_conninfo(url)
    if not _SCHEME.fullmatch(scheme):
        return _HIDDEN
    parts = _split(scheme, rest)
    if parts is None:
        return f"{scheme}://{_HIDDEN}"
    user, password, place, query = parts
    if user is not None and "%" in user:  # an encoded colon, and the password behind it
        user = _HIDDEN
    login = "" if user is None else f"{user}{'' if password is None else f':{_HIDDEN}'}@"
    return f"{scheme}://{login}{place}" + (f"?{_hide_query(query)}" if query else "")


def quoted(url: str) -> str:
    """The URL with what stands raw in its secrets percent-encoded: an @, most of all.

    Raises `ValueError` where it cannot be told where the password ends.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or _is_file(scheme, rest):
        return url
    parts = _split(scheme, rest)
    if parts is None:
        raise ValueError(redact(url))
    user, password, place, query = parts
    login = "" if user is None else f"{user}@"
    if password is not None:
        login = f"{user}:{urllib.parse.quote(password, safe='%')}@"
    query = query.replace("@", "%40")
    return f"{scheme}{separator}{login}{place}" + (f"?{query}" if query else "")


def scrub(text: str, url: str) -> str:
    """A text of somebody else's, a driver's error for one, without any piece of a secret."""
    pieces = {
        secret[i : i + _LEAST] for secret in _secrets(url) for i in range(len(secret) - _LEAST + 1)
    }
    hidden = {
        i + offset
        for i in range(len(text))
        if text[i : i + _LEAST] in pieces
        for offset in range(_LEAST)
    }
    runs = itertools.groupby(range(len(text)), hidden.__contains__)
    return "".join(_HIDDEN if hide else "".join(text[i] for i in run) for hide, run in runs)


def _is_file(scheme: str, rest: str) -> bool:
    return scheme.startswith("sqlite") and rest[:1] in ("", "/", "?")


def _split(scheme: str, rest: str) -> tuple[str | None, str | None, str, str] | None:
    """User, password, host and path, query; None where they cannot be told apart.

    The password ends at the last @: one that holds an @ ought to be encoded. With an @ behind
    a ?, either may belong to the password, unless no colon comes before them.
    """
    head, _, query = rest.partition("?")
    if _is_file(scheme, rest):
        return None, None, head, query
    shape = _SHAPE.fullmatch(head)
    if shape is None or ("@" in query and ":" in head):
        return None
    return shape["user"], shape["password"], shape["host"] + (shape["path"] or ""), query


def _secrets(url: str) -> set[str]:
    scheme, separator, rest = url.partition("://")
    parts = _split(scheme, rest) if separator else None
    if redact(url) == _HIDDEN:
        found = {url}
    elif not separator:
        pairs = _PAIR.findall(url)
        found = {value.strip("'") for name, value in pairs if name not in _PLAIN}
    elif parts is None:
        found = {rest}
    else:
        user, password, _, query = parts
        found = {password or "", user if user and "%" in user else ""}
        found.update(_NAME.split("&".join(_pairs(query)[1])))
    for decode in (urllib.parse.unquote, urllib.parse.unquote_plus):
        found |= {decode(f) for f in found}
    return found | {urllib.parse.quote(f, safe="") for f in found}


def _pairs(query: str) -> tuple[list[str], list[str]]:
    """The pairs before the first that may be secret, and the others: maybe the rest of it."""
    pairs = query.split("&") if query else []
    plain = list(itertools.takewhile(lambda p: p.partition("=")[0] in _PLAIN and "=" in p, pairs))
    return plain, pairs[len(plain) :]


def _hide_query(query: str) -> str:
    plain, secret = _pairs(query)
    return "&".join([*plain, *(_hide_pair(pair.partition("=")[0]) for pair in secret[:1])])


def _hide_conninfo(text: str) -> str:
    """Of `host=x password=y`, or a path, what is no secret; nothing of what is neither."""
    if "=" not in text and not re.search(r":.*@", text, re.DOTALL):
        return text
    pairs = [(m[1], m[0]) for m in _PAIR.finditer(text)]
    if "".join(whole for _, whole in pairs) != text.rstrip():
        return _HIDDEN
    shown = []
    for name, whole in pairs:
        shown.append(whole if name in _PLAIN else _hide_pair(name))
        if name not in _PLAIN:
            break
    return " ".join(part.strip() for part in shown)


def _hide_pair(name: str) -> str:
    return f"{name}={_HIDDEN}" if name in _SECRET else _HIDDEN
