"""Images from other servers, where the operator allows it: nothing else is ever reached.

Whoever can name an address for the server to read could make it read what only the server can
reach. So a host must be on a list; every address its name resolves to is checked; and the
connection goes to the address that was checked, not to the name, which may resolve to another by
then. A redirect is another address, checked in the same way.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Iterable

import httpx

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0
"""For all of one image, from the first name to the last byte."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Fetcher:
    """Reads images from hosts that are on a list.

    Args:
        hosts: `name` or `name:port` for https, `http://name` or `http://name:port` for http.
        networks: addresses that are not public and may be read all the same, such as 10.0.0.0/8.
        verify: certificates to trust; None: those that httpx does.

    Raises:
        ValueError: for a network that is none.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        networks: Iterable[str] = (),
        verify: ssl.SSLContext | None = None,
    ) -> None:
        self._origins = {h if "://" in h else f"https://{h}" for h in hosts}
        self._networks: list[Network] = [ipaddress.ip_network(n) for n in networks]
        self._verify = verify or True
        for name in ("httpx", "httpcore"):  # they log whole addresses, and some carry a key
            logging.getLogger(name).setLevel(logging.WARNING)

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """Return the content of a URL.

        Raises:
            ValueError: for what is not allowed, or cannot be read whole in time; it says nothing
                of where a name leads.
        """
        deadline = time.monotonic() + TIMEOUT_S
        # No proxy of the environment: it would resolve names anew.
        with httpx.Client(trust_env=False, verify=self._verify, timeout=TIMEOUT_S) as client:
            for _ in range(MAX_REDIRECTS + 1):
                try:
                    content, url = self._read(client, httpx.URL(url), max_bytes, deadline)
                except (httpx.HTTPError, httpx.InvalidURL, OSError):
                    raise ValueError("its address cannot be read") from None
                if content is not None:
                    return content
        raise ValueError(f"its address leads on more than {MAX_REDIRECTS} times")

    def _read(
        self, client: httpx.Client, url: httpx.URL, max_bytes: int, deadline: float
    ) -> tuple[bytes | None, str]:
        """Return the content, or None and the address that it is said to be at."""
        address = self._check(url)
        pinned = url.copy_with(host=str(address), fragment=None)
        headers = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"}
        extensions = {"sni_hostname": url.host}
        with client.stream("GET", pinned, headers=headers, extensions=extensions) as response:
            if response.is_redirect:
                return None, str(url.join(response.headers["location"]))
            if response.status_code != 200 or response.headers.get("content-encoding"):
                raise ValueError("its address does not give an image as it is")
            content = bytearray()
            for part in response.iter_raw():
                content += part
                if len(content) > max_bytes:
                    raise ValueError(f"more than the {max_bytes} bytes that are let in")
                if time.monotonic() > deadline:
                    raise ValueError("its address takes too long")
        return bytes(content), ""

    def _check(self, url: httpx.URL) -> Address:
        origin = f"{url.scheme}://{url.netloc.decode('ascii')}"
        if origin not in self._origins or url.userinfo:
            raise ValueError("its host is not one that images are read from")
        port = url.port or {"https": 443, "http": 80}[url.scheme]
        found = socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        if not addresses or not all(map(self._may_be_read, addresses)):
            raise ValueError("its host is not one that images are read from")
        return addresses[0]

    def _may_be_read(self, address: Address) -> bool:
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if any(address in network for network in self._networks):
            return True
        return address.is_global and not address.is_multicast
