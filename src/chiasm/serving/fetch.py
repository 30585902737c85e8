"""Pictures from http(s) addresses, for servers that allow it: only public addresses, checked after DNS and at every
redirect, and the connection goes to the very address that was checked."""

import asyncio
import ipaddress
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from chiasm.serving.errors import ApiError, brief
from chiasm.serving.pictures import invalid

PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
CHUNK = 65_536
TRANSLATED = tuple(
    ipaddress.IPv6Network(net)
    for net in ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)
"""Addresses of IPv6 that hold one of IPv4, which a gateway would turn into whatever it is."""

Resolve = Callable[[str, int], Awaitable[list[str]]]
Take = Callable[[int], None]


def is_public(address: str) -> bool:
    """Whether an address is on the open Internet: not private, loopback, link-local, shared, multicast, reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.is_site_local or any(ip in net for net in TRANSLATED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


@dataclass(frozen=True)
class Fetcher:
    """Fetches pictures.

    Args:
        most: bytes of a picture.
        seconds: for all of it, redirects included.
        resolve: all addresses of a name.
        allowed: whether an address may be connected to.
        ports: that an address may name.
    """

    most: int
    seconds: float
    resolve: Resolve
    allowed: Callable[[str], bool] = is_public
    ports: tuple[int, ...] | None = tuple(PORTS.values())

    async def __call__(self, url: str, param: str, take: Take) -> bytes:
        """The bytes behind an address.

        Args:
            take: is told of the bytes as they come, and may refuse them.

        Raises:
            ApiError: the address is not allowed, or no picture came in time.
        """
        try:
            async with asyncio.timeout(self.seconds):
                for _ in range(REDIRECTS + 1):
                    status, headers, body = await self._get(url, param, take)
                    location = headers.get("location")
                    if status not in (301, 302, 303, 307, 308) or location is None:
                        break
                    url = urljoin(url, location)
                else:
                    raise invalid(f"more than {REDIRECTS} redirects", param)
        except TimeoutError:
            raise invalid(f"{brief(url)!r} did not answer within {self.seconds:g} s", param) from None
        except (OSError, h11.ProtocolError, ValueError) as error:
            raise invalid(f"{brief(url)!r} cannot be fetched: {brief(str(error))}", param) from None
        if status != 200:
            raise invalid(f"{brief(url)!r} answered with status {status}", param)
        return body

    async def _get(self, url: str, param: str, take: Take) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(url)
        host, port = self._target(parts, param)
        address = await self._address(host, port, param)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            address, port, ssl=context, server_hostname=host if context else None
        )
        try:
            return await self._exchange(parts, host, reader, writer, param, take)
        finally:
            writer.transport.abort()

    def _target(self, parts: SplitResult, param: str) -> tuple[str, int]:
        if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
            raise invalid("its address is not of the form http(s)://host/path", param)
        port = parts.port or PORTS[parts.scheme]
        if self.ports is not None and port not in self.ports:
            raise invalid(f"port {port} is not allowed; allowed are {', '.join(map(str, self.ports))}", param)
        return parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname, port

    async def _address(self, host: str, port: int, param: str) -> str:
        """One address of a name, all of whose addresses are allowed."""
        addresses = await self.resolve(host, port)
        if not addresses or not all(self.allowed(address) for address in addresses):
            raise ApiError(
                400,
                f"Invalid image: {brief(host)!r} is not on the public Internet, so it is not fetched.",
                param=param,
                code="address_not_allowed",
            )
        return addresses[0]

    async def _exchange(
        self,
        parts: SplitResult,
        host: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        param: str,
        take: Take,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        name = f"[{host}]" if ":" in host else host
        named = name if parts.port is None else f"{name}:{parts.port}"
        headers = [("Host", named), ("Accept", "image/*"), ("User-Agent", "chiasm"), ("Connection", "close")]
        request = h11.Request(method="GET", target=_ascii(target), headers=headers)
        writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
        await writer.drain()
        status, answered, body = 0, {}, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                status, answered = (
                    event.status_code,
                    {key.decode(): value.decode("latin-1") for key, value in event.headers},
                )
            elif isinstance(event, h11.Data):
                take(len(event.data))
                body += event.data
                if len(body) > self.most:
                    raise invalid(f"it is larger than {self.most:,} bytes", param)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return status, answered, bytes(body)


def _ascii(target: str) -> str:
    return "".join(
        letter if "!" <= letter <= "~" else "".join(f"%{b:02X}" for b in letter.encode()) for letter in target
    )
