"""The doors of the server: which requests come in at all, how many at a time and how much they carry, and what every
answer says to browsers.

Against DNS rebinding, the Host must be a name of this server. Against pages of other sites, whatever changes something
must come from this origin, from one that the operator lists, or from no browser at all. Bodies are counted as they
stream, and not waited for without end. Pure ASGI, so that streams pass unbuffered.

Doors has to be the outermost layer: Gradio puts a CORS of its own around all middleware it is given, which on any host
but localhost lets every site read every answer; its headers are taken out here. So, in the lifespan of Gradio's app:
app.middleware_stack = Doors(app.middleware_stack, ...).

Knows nothing of callers (auth.py) or routes. Test: pytest tests/test_doors_middleware.py
"""

import asyncio
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv6Address

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs import csp
from jobs.problems import problem
from pipeline.addresses import parse_address
from pipeline.errors import CrossSite, ForeignHost, InvalidOption, ServerBusy, VideoTooLarge

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # change nothing, and other sites cannot read the answers
MULTIPART_BYTES = 64 * 1024  # what a form with a file holds beside the file
BUSY_S = 5  # to come back after
BODY_S = 60  # for a body to come, or for the next part of an upload
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SITE = re.compile(
    r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?)(?::(?P<port>[0-9]{0,5}))?", re.ASCII
)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?P<site>.+)", re.ASCII)
UNUSED = ("camera", "display-capture", "geolocation", "microphone", "midi", "payment", "serial", "usb")
UNCACHED = ("", "application/json", "application/problem+json", "text/plain")  # depend on who asks, or on the moment


class BodyRefused(Exception):
    """The body went over its limit while it was read, or did not come: Doors answers, whatever the app makes of it."""


class Doors:
    """Checks requests before app sees them, and completes the headers of its answers."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] | None,
        cors_origins: Collection[str],
        max_requests: int,
        max_body_bytes: int,
        max_upload_bytes: int,
        upload_paths: Collection[str],
        embed_origins: Collection[str] = (),
    ) -> None:
        """allowed_hosts are names without port, *.example.org standing for all below it; None lets any name in.
        cors_origins may use the API, embed_origins may show the page in a frame; both are as in https://example.org.
        max_requests may be under way at a time, event streams included; more are answered 503. Raises InvalidOption for
        names and origins that are none."""
        self._allowed_hosts = None if allowed_hosts is None else frozenset(map(_host_name, allowed_hosts))
        self._cors_origins = frozenset(_origin(entry, "CORS_ORIGINS") for entry in cors_origins)
        framers = sorted(_origin(entry, "EMBED_ORIGINS") for entry in embed_origins)
        self._framing = " ".join(["; frame-ancestors 'self'", *framers])
        self._max_requests, self._num_requests = max_requests, 0
        self._max_body_bytes, self._max_upload_bytes = max_body_bytes, max_upload_bytes + MULTIPART_BYTES
        self._upload_paths = frozenset(upload_paths)
        self._app = _without_cors(app)
        self._inner: ASGIApp = self._with_request_limit  # its 503 and 413 are for pages of listed origins, too
        if self._cors_origins:
            self._inner = CORSMiddleware(
                self._with_request_limit,
                allow_origins=self._cors_origins,
                allow_methods=("GET", "HEAD", "POST", "DELETE"),
                allow_headers=("Authorization", "Idempotency-Key", "Last-Event-ID"),
                expose_headers=("Location", "Retry-After", "Content-Disposition"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refusal = self._refusal(headers, is_safe=scope["method"] in SAFE_METHODS)
            await (refusal or self._inner)(scope, receive, self._with_security_headers(headers, send))
        elif scope["type"] == "websocket" and self._refusal(Headers(scope=scope), is_safe=False):
            await send({"type": "websocket.close", "code": 1008})  # the server makes it a 403
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, *, is_safe: bool) -> Response | None:
        hosts = headers.getlist("host")
        host = parse_site(hosts[0]) if len(hosts) == 1 else None
        if host is None:
            return problem(400, ForeignHost.code, "The request needs one Host header, naming this server. Send one.")
        if not self._is_ours(host):
            return problem(
                400,
                ForeignHost.code,
                f"This server does not go by the name {host.name}. Use one of its names, or let its operator add this "
                "name to the setting ALLOWED_HOSTS.",
            )
        if not is_safe and self._is_cross_site(headers, host):
            return problem(
                403,
                CrossSite.code,
                "A page of another site sent this request. Use this server's own page or a program, or let the "
                "operator add the page's origin to the setting CORS_ORIGINS.",
            )
        return None

    def _is_ours(self, host: "Site") -> bool:
        if self._allowed_hosts is None or host.name in self._allowed_hosts:
            return True
        return any(name.startswith("*.") and host.name.endswith(name[1:]) for name in self._allowed_hosts)

    def _is_cross_site(self, headers: Headers, host: "Site") -> bool:
        """Browsers send Origin with whatever changes something; pages cannot set or remove either header."""
        origins = headers.getlist("origin")
        if not origins:
            return headers.get("sec-fetch-site", "none") not in ("same-origin", "none")  # "same-site": a neighbour
        return len(origins) > 1 or not (origins[0] in self._cors_origins or parse_origin(origins[0]) == host)

    async def _with_request_limit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._num_requests >= self._max_requests:
            text = f"This server answers {self._max_requests:,} requests already. Try again in {BUSY_S} s."
            return await problem(503, ServerBusy.code, text, {"Retry-After": str(BUSY_S)})(scope, receive, send)
        self._num_requests += 1
        try:
            await self._with_body_limit(scope, receive, send)
        finally:
            self._num_requests -= 1

    async def _with_body_limit(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = route_path(scope) in self._upload_paths
        limit = self._max_upload_bytes if is_upload else self._max_body_bytes
        refusal = _too_large(limit, is_upload) if _content_length(Headers(scope=scope)) > limit else None
        num_bytes, is_whole, has_started = 0, False, False
        ends_at_s = time.monotonic() + BODY_S

        async def counted() -> Message:
            nonlocal num_bytes, is_whole, refusal
            left_s = BODY_S if is_upload else ends_at_s - time.monotonic()
            try:
                async with asyncio.timeout(None if is_whole else left_s):  # a whole one waits for the end
                    message = await receive()
            except TimeoutError:
                refusal = _too_slow(is_upload)
                raise BodyRefused from None
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > limit:
                refusal = _too_large(limit, is_upload)
                raise BodyRefused
            return message

        async def guarded(message: Message) -> None:
            nonlocal has_started
            if has_started or refusal is None:  # FastAPI answers 400 to what goes wrong in a body: drop that
                has_started = True
                await send(message)

        try:
            if refusal is None:
                await self._app(scope, counted, guarded)
        except Exception:  # BodyRefused, or what the app made of it
            if has_started or refusal is None:
                raise
        if refusal is not None and not has_started:
            await refusal(scope, receive, send)

    def _with_security_headers(self, request_headers: Headers, send: Send) -> Send:
        """Complete an answer's headers, where the app has not set them. Not among them is Strict-Transport-Security,
        which binds a name and all its ports for long: that is for the proxy to say that has the certificate."""
        is_listed = request_headers.get("origin") in self._cors_origins
        wanted = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "cross-origin" if is_listed else "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Permissions-Policy": ", ".join(f"{name}=()" for name in UNUSED),
        }

        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                for name, value in wanted.items():
                    headers.setdefault(name, value)
                kind = headers.get("content-type", "").partition(";")[0]
                policy = csp.MEDIA if kind.startswith(("video/", "image/")) else csp.ANSWER
                headers["Content-Security-Policy"] = headers.get("content-security-policy", policy) + self._framing
                if kind in UNCACHED and "etag" not in headers:
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        return completed


@dataclass(frozen=True)
class Site:
    """A host and its port, as Host and Origin name them. 80 and 443 are no port: who ends TLS may be a proxy."""

    name: str
    port: int | None = None


def route_path(scope: Scope) -> str:
    """The path by which a request's route is found: without root_path, which routing takes off where it stands."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def parse_site(text: str) -> Site | None:
    """Read name[:port]; None if it is malformed. The name comes in lower case and without last dot, an IPv6 address
    without brackets and in its shortest spelling."""
    match = SITE.fullmatch(text.lower())
    if match is None:
        return None
    name, port = match["name"], int(match["port"] or 0)
    if match["ipv6"] is not None:
        address = parse_address(match["ipv6"])
        name = str(address) if isinstance(address, IPv6Address) else None
    return Site(name, None if port in (0, 80, 443) else port) if name and port <= 65535 else None


def parse_origin(text: str) -> Site | None:
    """Read scheme://name[:port]; None for "null" and whatever else is none."""
    match = ORIGIN.fullmatch(text.lower())
    return parse_site(match["site"]) if match else None


def is_loopback(host: str) -> bool:
    """Say whether who listens on this address is reached from this computer only."""
    address = parse_address(host.strip("[]"))
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def default_allowed_hosts(host: str, extra: Collection[str]) -> frozenset[str] | None:
    """Say what a server that listens on host goes by. None: any name, since nobody named one."""
    if not (is_loopback(host) or extra):
        return None
    return frozenset({*LOOPBACK_NAMES, *extra, host or "0.0.0.0"})  # Gradio and health checks ask from this computer


def _host_name(entry: str) -> str:
    """Read an entry of ALLOWED_HOSTS. Raises InvalidOption."""
    wildcard, rest = ("*.", entry[2:]) if entry.startswith("*.") else ("", entry)
    site = parse_site(f"[{rest}]" if rest.count(":") > 1 and not rest.startswith("[") else rest)
    if site is None:
        raise InvalidOption(f"ALLOWED_HOSTS: {entry!r} is no name. Give names as in example.org, *.example.org or ::1.")
    return wildcard + site.name


def _origin(entry: str, setting: str) -> str:
    """Read an entry of CORS_ORIGINS or EMBED_ORIGINS. Raises InvalidOption."""
    origin = entry.lower().removesuffix("/")
    if parse_origin(origin) is None:
        raise InvalidOption(f"{setting}: {entry!r} is no origin. Give origins as in https://example.org.")
    return origin


def _without_cors(app: ASGIApp) -> ASGIApp:
    """Take out the headers by which a layer inside lets other sites read answers."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def cleaned(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                message["headers"] = [item for item in headers if not item[0].lower().startswith(b"access-control-")]
            await send(message)

        await app(scope, receive, cleaned)

    return wrapped


def _content_length(headers: Headers) -> int:
    """What the request announces; 0 if that is nothing, or no number: the bytes are counted anyway."""
    try:
        return int(headers.get("content-length", 0))
    except ValueError:
        return 0


def _too_large(limit: int, is_upload: bool) -> Response:
    advice = "Send a smaller video, or let the operator raise MAX_VIDEO_BYTES." if is_upload else "Send less at once."
    return problem(413, VideoTooLarge.code, f"The request's body is larger than {limit:,} bytes. {advice}")


def _too_slow(is_upload: bool) -> Response:
    text = f"The upload paused for {BODY_S} s." if is_upload else f"The request's body did not come within {BODY_S} s."
    return problem(400, InvalidOption.code, f"{text} Send it again.", {"Connection": "close"})
