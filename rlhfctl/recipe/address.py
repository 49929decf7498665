"""Whether a text is the address of an HTTP service: what no client could connect to is told with its recipe's line."""

from urllib.parse import urlsplit


def check_address(url: str) -> None:
    """Raises ValueError with a sentence of its own."""
    wrong = f"{url} is no address of a reward service: "
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{wrong}it starts with http:// or https://")
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").encode("idna"), parts.port
    except ValueError as error:  # a port that is no number, half an IPv6 address, a name that is too long
        raise ValueError(f"{wrong}{error}") from None
    if not host or " " in url or not url.isprintable():
        raise ValueError(f"{wrong}it names no host")
