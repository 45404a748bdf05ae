"""Claims a port, before there is anything to serve on it."""

import errno
import os
import socket

from evener.errors import StartFailed


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening: claims the port before the model is loaded, and refuses clients until then.

    Raises StartFailed with the remedy.
    """
    if not 0 <= port <= 65535:  # the resolver would silently take it modulo 65536
        raise StartFailed(f"port {port} is not between 0 and 65535; choose another with --port")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartFailed(f"host {host!r} is not understood ({error.strerror}); choose another with --host") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        return made
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: "stop what uses it, or choose another with --port",
            errno.EACCES: "ports below 1024 need rights; choose another with --port",
            errno.EADDRNOTAVAIL: "this host has no such address; choose another with --host",
        }
        remedy = remedies.get(error.errno or 0, "check --host and --port")
        made.close()
        raise StartFailed(f"cannot listen on {host}:{port} ({os.strerror(error.errno or 0)}); {remedy}") from error
