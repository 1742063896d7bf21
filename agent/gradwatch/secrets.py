"""Store URLs without their secrets: fit for a log, an error or a page.

What cannot be told apart for sure is hidden whole.
"""

from __future__ import annotations

import re
import urllib.parse

__all__ = ["quoted", "redact", "scrub"]

_HIDDEN = "***"
# Parameters of a URL that are no secret; of any other only the name is shown.
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
        "sslmode",
        "target_session_attrs",
        "tcp_user_timeout",
        "timeout",
        "user",
    ]
)
_LEAST = 4  # a shorter secret is not looked for in a text: it would be found in other words
_HOST = r"(\[[^\]@]*\]|[^@/?#\s:,\[\]]*)(:\d*)?"
_SHAPE = re.compile(
    rf"[\w+.-]+://((?P<user>[^:/@?#]*)(:(?P<password>.*))?@)?"
    rf"(?P<host>{_HOST}(,{_HOST})*)(?P<path>/[^@]*)?",
    re.DOTALL,
)
_PAIR = re.compile(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|\S+)")


def redact(url: str) -> str:
    """The URL with *** for its password, and for every parameter not known to be harmless."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _PAIR.sub(_hide_pair, url)
    if scheme.startswith("sqlite"):
        path, _, query = rest.partition("?")
        return f"{scheme}://{path}" + (f"?{_hide_query(query)}" if query else "")
    parts = _split(url)
    if parts is None:
        return f"{scheme}://{_HIDDEN}"
    user, password, host, path, query = parts
    login = "" if user is None else f"{user}{'' if password is None else f':{_HIDDEN}'}@"
    return f"{scheme}://{login}{host}{path}" + (f"?{_hide_query(query)}" if query else "")


def quoted(url: str) -> str:
    """The URL with what stands raw in its secrets percent-encoded: an @, most of all.

    Raises `ValueError` where it cannot be told where the password ends.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.startswith("sqlite"):
        return url
    parts = _split(url)
    if parts is None:
        msg = "percent-encode what is special in the password"
        raise ValueError(msg)
    user, password, host, path, query = parts
    login = "" if user is None else f"{user}@"
    if password is not None:
        login = f"{user}:{urllib.parse.quote(password, safe='%')}@"
    query = query.replace("@", "%40")
    return f"{scheme}{separator}{login}{host}{path}" + (f"?{query}" if query else "")


def scrub(text: str, url: str) -> str:
    """A text of somebody else's, a driver's error for one, without the URL's secrets."""
    found = sorted(_secrets(url), key=len, reverse=True)
    for secret in found:
        text = text.replace(secret, _HIDDEN)
    return text


def _split(url: str) -> tuple[str | None, str | None, str, str, str] | None:
    """User, password, host, path, query; None where they cannot be told apart.

    The password ends at the last @ before the query: one that holds an @ ought to be encoded.
    """
    head, _, query = url.partition("?")
    if any("@" in pair and "=" not in pair for pair in query.split("&")):
        if "@" in head:
            return None
        before, _, after = url.rpartition("@")  # the ? is in the password
        behind, _, query = after.partition("?")
        head = f"{before}@{behind}"
    elif "@" in query and "@" not in head and re.search(r"://[^/]*:[^/]*$", head):
        return None
    shape = _SHAPE.fullmatch(head)
    if shape is None:
        return None
    return shape["user"], shape["password"], shape["host"], shape["path"] or "", query


def _secrets(url: str) -> set[str]:
    scheme, separator, rest = url.partition("://")
    found: set[str] = set()
    if not separator:
        found.update(value.strip("'") for name, value in _PAIR.findall(url) if name not in _PLAIN)
    elif not scheme.startswith("sqlite"):
        parts = _split(url)
        if parts is None:
            found.update(re.split(r"[:/@?&=]", rest))
        else:
            found.add(parts[1] or "")
            for pair in parts[4].split("&"):
                name, _, value = pair.partition("=")
                found.update(() if name in _PLAIN else (value or name,))
    found |= {urllib.parse.unquote(f) for f in found} | {
        urllib.parse.unquote_plus(f) for f in found
    }
    found |= {urllib.parse.quote(f, safe="") for f in found}
    found |= {piece for f in found for piece in re.split(r"[@/?#:&=\s]", f)}
    return {secret for secret in found if len(secret) >= _LEAST}


def _hide_query(query: str) -> str:
    shown = []
    for pair in query.split("&"):
        name, equals, value = pair.partition("=")
        if not equals:
            shown.append(_HIDDEN)
        else:
            shown.append(f"{name}={value if name in _PLAIN else _HIDDEN}")
    return "&".join(shown)


def _hide_pair(pair: re.Match[str]) -> str:
    return pair[0] if pair[1] in _PLAIN else f"{pair[1]}={_HIDDEN}"
