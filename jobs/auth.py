"""Who asks: the owner of a key, by Bearer header or the page's session cookie; without keys, a visitor by cookie, or
the user of this computer.

Keys are kept as SHA-256 only. A session is signed together with its key, so it ends when the key leaves the settings.
EventSource, video and img cannot send headers: hence the cookie. Knows no routes. Test: pytest tests/test_auth.py
"""

import hashlib
import hmac
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.responses import Response

from jobs.doors import is_loopback
from pipeline.addresses import parse_address
from pipeline.atomic import write_private
from pipeline.errors import InvalidOption, RateLimited, Unauthorized

SESSION_COOKIE, SESSION_S = "moonreel_session", 30 * 24 * 3600
VISITOR_COOKIE, VISITOR_S = "moonreel_visitor", 365 * 24 * 3600
VISITOR = re.compile(r"[0-9a-f]{32}")
KEY = re.compile(r"(?:(?P<name>[A-Za-z0-9_-]{1,32}):)?(?P<key>[A-Za-z0-9._~+/=-]{16,})")  # no colon in a key
SECRET = re.compile(r"[0-9a-f]{64}")
MAX_BUCKETS = 10_000
GUESSES_PER_MINUTE, MAX_GUESSES = 10, 100  # wrong keys from one address; the second at once


@dataclass(frozen=True)
class Caller:
    """Who asks. owner is "key:NAME", "key:HASH", "visitor:HASH" or "local", and names nobody's key or cookie."""

    owner: str
    is_admin: bool = False
    new_cookie: str | None = field(default=None, repr=False, compare=False)  # of a visitor not seen before

    @property
    def is_visitor(self) -> bool:
        """Somebody without a key, on a server that asks for none."""
        return self.owner.startswith("visitor:")

    def may_see(self, record_owner: str, *, has_keys: bool) -> bool:
        """With keys, one's own jobs; an admin all. Without, whoever knows a job's id may see it."""
        return not has_keys or self.is_admin or self.owner == record_owner


def parse_keys(api_keys: str, admin_keys: str = "") -> dict[bytes, Caller]:
    """Read the settings "name:KEY,name:KEY,KEY". -> the SHA-256 of each key, and who has it

    Raises InvalidOption without quoting anything, since what stands in the wrong place may be a key.
    """
    keys: dict[bytes, Caller] = {}
    for setting, text in (("API_KEYS", api_keys), ("ADMIN_KEYS", admin_keys)):
        for number, entry in enumerate(filter(None, map(str.strip, text.split(","))), 1):
            match = KEY.fullmatch(entry)
            if match is None:
                raise InvalidOption(
                    f"{setting}: entry {number} is neither KEY nor name:KEY. A key has 16 characters or more out of "
                    "A-Z a-z 0-9 . _ ~ + / = -, a name 1 to 32 out of A-Z a-z 0-9 _ -."
                )
            digest = _sha256(match["key"])
            caller = Caller(f"key:{match['name'] or digest.hex()[:16]}", is_admin=setting == "ADMIN_KEYS")
            if digest in keys or caller.owner in {other.owner for other in keys.values()}:
                raise InvalidOption(f"{setting}: the key or name of entry {number} was given before. Give each once.")
            keys[digest] = caller
    return keys


LOCAL_USER = Caller("local", is_admin=True)


class Gate:
    """Tells callers by what they send."""

    def __init__(
        self,
        keys: Mapping[bytes, Caller],
        secret: bytes,
        clock: Callable[[], float] = time.time,
        *,
        is_local: bool = False,
        is_embedded: bool = False,
    ) -> None:
        """keys as from parse_keys; none lets everybody in: visitors, each with a list of their own, or, where only this
        computer is served, the one user of it. secret signs sessions. clock tells Unix seconds. is_embedded: pages of
        other sites show ours in a frame."""
        self._keys, self._secret, self._clock, self._is_local = keys, secret, clock, is_local
        self._is_embedded = is_embedded
        self._digests = {caller.owner: digest for digest, caller in keys.items()}
        self._guesses = RateLimit(GUESSES_PER_MINUTE, MAX_GUESSES)
        self._used: dict[tuple[str, bytes], None] = {}  # which keys opened at which address, the oldest first
        self._changes = threading.Lock()
        self.has_keys = bool(keys)

    def identify(self, request: HTTPConnection) -> Caller:
        """Raises Unauthorized if keys are asked for and none came, or a wrong one; RateLimited, as check_key does."""
        if not self.has_keys and self._is_local:
            return LOCAL_USER
        if not self.has_keys:
            return _visitor(request.cookies.get(VISITOR_COOKIE, ""))
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":  # another scheme is for a proxy in front of us
            return self.check_key(request, key.strip())
        if caller := self._session(request.cookies.get(SESSION_COOKIE, "")):
            return caller
        raise Unauthorized('This server asks for a key. Send "Authorization: Bearer KEY", or log in on the page.')

    def check_key(self, request: HTTPConnection, key: str) -> Caller:
        """Say whose key this is. Raises Unauthorized if it is nobody's; RateLimited after many wrong ones there,
        at an address, where only keys that it has used before open then: guesses do not shut out neighbours."""
        digest, address = _sha256(key), address_of(request)
        found = [caller for known, caller in self._keys.items() if hmac.compare_digest(known, digest)]  # looks at all
        at_home = (address, digest)
        if found and at_home in self._used:
            return found[0]
        if wait_s := self._guesses.wait_s(address) if found else self._guesses.take(address):
            raise RateLimited(f"Too many wrong keys from your address. Try again in {math.ceil(wait_s)} s.", wait_s)
        if not found:
            raise Unauthorized('This key is not known here. Send "Authorization: Bearer KEY", or log in on the page.')
        with self._changes:
            self._used[at_home] = None
            if len(self._used) > MAX_BUCKETS:
                del self._used[next(iter(self._used))]
        return found[0]

    def session_cookie(self, caller: Caller) -> str:
        """Make the value of the page's cookie for the owner of a key: owner.expiry.signature, good for 30 days."""
        expiry = str(int(self._clock()) + SESSION_S)
        return f"{caller.owner}.{expiry}.{self._sign(caller.owner, expiry)}"

    def _session(self, cookie: str) -> Caller | None:
        owner, expiry, signature = [*cookie.split(".", 2), "", ""][:3]
        if owner not in self._digests:
            return None
        is_ours = hmac.compare_digest(signature.encode(), self._sign(owner, expiry).encode())
        return self._keys[self._digests[owner]] if is_ours and int(expiry) > self._clock() else None

    def set_session(self, request: HTTPConnection, response: Response, cookie: str) -> None:
        """Log in on the page, with a cookie as from session_cookie, or out, with "". To browsers, a cookie for frames
        and another are two, and both are sent: the other one is removed, as the setting may have changed; first, as
        older browsers take the two for one."""
        if _is_https(request):
            self._set_cookie(request, response, SESSION_COOKIE, "", 0, is_embedded=not self._is_embedded)
        self._set_cookie(request, response, SESSION_COOKIE, cookie, SESSION_S if cookie else 0)

    def set_visitor(self, request: HTTPConnection, response: Response, caller: Caller) -> None:
        """Let a new visitor be known next time; does nothing for all others. Programs without cookies stay new."""
        if caller.new_cookie is not None:
            self._set_cookie(request, response, VISITOR_COOKIE, caller.new_cookie, VISITOR_S)

    def _set_cookie(
        self,
        request: HTTPConnection,
        response: Response,
        name: str,
        value: str,
        max_age_s: int,
        is_embedded: bool | None = None,
    ) -> None:
        """Within a frame of another site, browsers keep and send only what is SameSite=none, over https; Partitioned
        keeps it apart for each site around. Doors refuses what other sites send, with these cookies or without.
        (Response.set_cookie knows Partitioned from Python 3.14 on.)"""
        is_https = _is_https(request)
        is_framed = is_https and (self._is_embedded if is_embedded is None else is_embedded)
        same_site = "none" if is_framed else "lax"
        attributes = [f"{name}={value}", "HttpOnly", f"Max-Age={max_age_s}", "Path=/", f"SameSite={same_site}"]
        attributes += ["Secure"] * is_https + ["Partitioned"] * is_framed
        response.headers.append("set-cookie", "; ".join(attributes))

    def _sign(self, owner: str, expiry: str) -> str:
        return hmac.new(self._secret, self._digests[owner] + f"{owner}.{expiry}".encode(), hashlib.sha256).hexdigest()


def _is_https(request: HTTPConnection) -> bool:
    return request.headers.get("x-forwarded-proto", request.url.scheme).lower().startswith("https")


def _visitor(cookie: str) -> Caller:
    new_cookie = None if VISITOR.fullmatch(cookie) else secrets.token_hex(16)
    return Caller(f"visitor:{_sha256(new_cookie or cookie).hex()[:32]}", new_cookie=new_cookie)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()  # JSON may bring half characters


def load_secret_bytes(folder: Path) -> bytes:
    """Read the 32 bytes that sign sessions, made at the first start. Raises InvalidOption if that cannot be."""
    path = folder / "session-secret"
    try:
        if not path.exists():
            write_private(path, secrets.token_hex(32))
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise InvalidOption(f"{path} cannot be read or written: {error.strerror}. Make it possible.") from error
    if not SECRET.fullmatch(text):
        raise InvalidOption(f"{path} is damaged. Delete it; everybody has to log in again then.")
    return bytes.fromhex(text)


def check_exposure(host: str, has_keys: bool, allow_anonymous: bool) -> None:
    """Raises InvalidOption if other computers could use this server without anybody having said so."""
    if not (is_loopback(host) or has_keys or allow_anonymous):
        raise InvalidOption(
            f"HOST {host} lets other computers in without a key. Set API_KEYS, or ALLOW_ANONYMOUS, or HOST 127.0.0.1."
        )


class RateLimit:
    """Lets so many requests per minute and key pass, burst of them at once. Remembers MAX_BUCKETS keys at most."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s, self._burst_s, self._clock = 60 / per_minute, burst * 60 / per_minute, clock
        self._whole_at: dict[str, float] = {}  # when the burst is whole again: all that a token bucket needs
        self._lock = threading.Lock()

    def take(self, key: str, cost: int = 1) -> float:
        """Count a request, or so many. -> 0, or the seconds to wait before the next try; those tries cost nothing"""
        with self._lock:
            now = self._clock()
            whole_at = max(self._whole_at.pop(key, now), now)
            wait_s = self._short_s(whole_at, now, cost)
            # The last in order from here on.
            self._whole_at[key] = whole_at if wait_s else whole_at + self._interval_s * cost
            while self._whole_at and (len(self._whole_at) > MAX_BUCKETS or next(iter(self._whole_at.values())) <= now):
                del self._whole_at[next(iter(self._whole_at))]
            return wait_s

    def wait_s(self, key: str) -> float:
        """What take would answer, without counting."""
        now = self._clock()
        return self._short_s(max(self._whole_at.get(key, now), now), now, 1)

    def _short_s(self, whole_at: float, now: float, cost: int) -> float:
        return max(0.0, round(whole_at + self._interval_s * cost - self._burst_s - now, 3))


def rate_key(request: HTTPConnection, caller: Caller) -> str:
    """Say whom a request counts for: a key's owner; as cookies can be dropped, a visitor's address."""
    return address_of(request) if caller.is_visitor else caller.owner


def address_of(request: HTTPConnection) -> str:
    """Where a request comes from; of an IPv6 address, the network (/64), as a host there has as many as it likes."""
    host = request.client.host if request.client else ""
    address = parse_address(host)
    return address.exploded[:19] if isinstance(address, IPv6Address) and not address.ipv4_mapped else host
