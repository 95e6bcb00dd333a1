"""Read a URL from a stranger, strictly, and say whether it may be followed at all.

A URL is read once, here; what connects later gets its parts and reads no text again, so two readers cannot disagree.
This module asks no name server: what a name leads to is checked by safe_http.py. Refusals are worded without what they
refuse, which may hold passwords.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote, urljoin, urlsplit

import idna

from pipeline.addresses import IPAddress, is_link_local, is_public, parse_address

MAX_URL_LENGTH = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
ANY_HOST = "*"
NETLOC = re.compile(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[^\[\]:]*))(?::(?P<port>[0-9]{0,5}))?", re.ASCII)
LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
NAME = re.compile(rf"{LABEL}(?:\.{LABEL})*")
NUMBER = re.compile(
    r"[0-9]+|0x[0-9a-f]*"
)  # as the last label it makes the whole an IPv4 address, says the URL standard


class UrlRefused(Exception):
    """A URL may not be followed. The message goes on after "Invalid ... URL: "."""


@dataclass(frozen=True)
class UrlRules:
    """What a URL may lead to."""

    ports: frozenset[int] = frozenset({80, 443, 8080, 8443})
    # Hosts, as URLs name them, that may have private addresses and any port; ANY_HOST for all. Link-local addresses,
    # where clouds keep credentials, need their host named.
    allow_private_urls: frozenset[str] = frozenset()

    def check_address(self, host: str, address: IPAddress, is_public: Callable[[IPAddress], bool] = is_public) -> None:
        """Raises UrlRefused if host may not have this address."""
        is_open = ANY_HOST in self.allow_private_urls and not is_link_local(address)
        if not (is_public(address) or is_open or host in self.allow_private_urls):
            raise UrlRefused(
                "it leads to an address that is not public. Use one that everybody can reach, or let the operator "
                "of this host list the URL's host in allow_private_urls."
            )

    def check_port(self, host: str, port: int) -> None:
        """Raises UrlRefused if URLs may not name this port of host."""
        if port not in self.ports and not self.allow_private_urls & {ANY_HOST, host}:
            raise UrlRefused(f"port {port} is not allowed. Use one of {', '.join(map(str, sorted(self.ports)))}.")


@dataclass(frozen=True)
class WebUrl:
    """A URL that may be followed, as far as its text says."""

    scheme: str  # http or https
    host: str  # a name in ASCII and lower case, or an address without brackets
    port: int
    target: str  # path and query in ASCII, as sent

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def address(self) -> IPAddress | None:
        return parse_address(self.host)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.target}"


def check_url(
    text: str, rules: UrlRules, *, base: WebUrl | None = None, is_public: Callable[[IPAddress], bool] = is_public
) -> WebUrl:
    """Read a URL, which may be relative to base. Raises UrlRefused saying what is wrong with it."""
    text = text.strip(" ")
    if len(text) > MAX_URL_LENGTH:
        raise UrlRefused(f"it is longer than {MAX_URL_LENGTH} characters.")
    if re.search(r"[\x00-\x1f\x7f\\]", text):  # urlsplit would silently drop some of them
        raise UrlRefused("it contains a control character or a backslash. Write it as a browser shows it.")
    try:
        parts = urlsplit(urljoin(str(base), text) if base else text)
    except ValueError:
        raise UrlRefused(
            "its host cannot be read. Write it as a browser shows it."
        ) from None  # it may quote a password
    if parts.scheme not in DEFAULT_PORTS:
        raise UrlRefused("only http:// and https:// are supported.")
    host, port = _host_and_port(parts.netloc)
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    rules.check_port(host, port)
    # Encoded as browsers do; what is encoded already stays.
    query = f"?{parts.query}" if parts.query else ""
    url = WebUrl(parts.scheme, host, port, re.sub(r"[^\x21-\x7e]|[\"<>^`{}]", _quote, (parts.path or "/") + query))
    if url.address:
        rules.check_address(host, url.address, is_public)
    return url


def parse_hosts(text: str) -> frozenset[str]:
    """Read allow_private_urls from a setting: hosts with commas between."""
    return frozenset(host.strip(" []").lower() for host in text.split(",") if host.strip(" []"))


def shown(url: str | WebUrl) -> str:
    """A URL, even a refused one, for logs and messages: without credentials, query and fragment."""
    text = re.sub(r"[\x00-\x1f\x7f]", "", str(url))
    text = re.sub(r"^([^/:]*:)?//[^/]*@", r"\1//", text)  # first, as a bad password may hold ? or #
    text, has_query, _ = re.sub(r"#.*", "", text).partition("?")
    return (text if len(text) <= 200 else f"{text[:200]}…") + ("?…" if has_query else "")


def _quote(match: re.Match[str]) -> str:
    return quote(match[0], errors="replace")


def _host_and_port(netloc: str) -> tuple[str, int | None]:
    if "@" in netloc:
        raise UrlRefused("it contains a user name or password. Use a link that needs none, such as a signed one.")
    match = NETLOC.fullmatch(netloc)
    if not match:
        raise UrlRefused("its host or port cannot be read. Write it as https://host/path or https://host:port/path.")
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise UrlRefused(f"there is no port {port}.")
    return (_name(match["name"]) if match["ipv6"] is None else _ipv6(match["ipv6"])), port


def _ipv6(text: str) -> str:
    address = parse_address(text)
    if not isinstance(address, IPv6Address) or address.scope_id is not None:  # a zone means this host's own cables
        raise UrlRefused("what stands in brackets is not an IPv6 address, or has a zone (%...).")
    return str(address)


def _name(text: str) -> str:
    if not text.isascii():
        try:
            text = idna.encode(text, uts46=True, std3_rules=True).decode()
        except UnicodeError as error:
            raise UrlRefused("its host is not a valid international name.") from error
    name = text.lower().removesuffix(".")
    if not name:
        raise UrlRefused("it names no host. Write it as https://host/path.")
    if NUMBER.fullmatch(name.rpartition(".")[2]):
        # Programs differ on 127.1, 0x7f.1, 2130706433 and 0127.0.0.1, so none of them is read at all.
        if not isinstance(parse_address(name), IPv4Address):
            raise UrlRefused("its host is an IP address in an unusual spelling. Write four decimal numbers.")
    elif len(name) > 253 or not NAME.fullmatch(name):
        raise UrlRefused("its host is not a valid name.")
    return name
