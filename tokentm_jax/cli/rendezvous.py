"""Where the processes of a job meet, before JAX does: JAX ends a process that meets nobody with a crash of C++."""

import socket
import time
from contextlib import ExitStack, suppress

from tokentm_jax.errors import InputError
from tokentm_jax.files import reason

PATIENCE = 300.0  # seconds to wait for the other processes, as in JAX
GREETING = b"tokentm_jax %d of %d\n"
LONGEST = 64  # bytes of a greeting


def meet(coordinator: str, processes: int, process: int, patience: float = PATIENCE) -> None:
    """Wait until all processes, numbered from 0, have met at an address of process 0: HOST:PORT or [HOST]:PORT.

    InputError for a wrong or unknown address, a port in use, or others that do not come in time.
    """
    address = _address(coordinator)
    until = time.monotonic() + patience
    if process == 0:
        _receive(coordinator, address[1], processes, until)
    else:
        _come(coordinator, address, GREETING % (process, processes), until)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16) or (":" in host) != bracketed:
        raise InputError(f"--coordinator must be HOST:PORT with a port from 1 to 65535, got {coordinator!r:.80}")
    try:
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--coordinator {coordinator}: the host {host} is unknown ({reason(error)})") from None
    return host, int(port)


def _receive(coordinator: str, port: int, processes: int, until: float) -> None:
    """Process 0: wait for the greetings of all others, and answer them together."""
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=processes
        )
    except OSError as error:
        raise InputError(f"--coordinator {coordinator}: the port cannot be opened ({reason(error)})") from None
    expected = {GREETING % (number, processes): number for number in range(1, processes)}
    present: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        stack.enter_context(server)
        while len(present) < len(expected):
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                guest = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(number) for number in expected.values() if number not in present)
                raise InputError(f"nobody came to {coordinator} as process {missing} of {processes}") from None
            guest.settimeout(1)
            number = expected.get(_line(guest))
            if number is None:  # of another program, or of a job of another size
                guest.close()
                continue
            if number in present:  # it was started again
                present[number].close()
            present[number] = guest
        for guest in present.values():
            with suppress(OSError):
                guest.sendall(GREETING % (0, processes))


def _come(coordinator: str, address: tuple[str, int], greeting: bytes, until: float) -> None:
    """Another process: greet process 0 until it answers that all are there."""
    while (left := until - time.monotonic()) > 0:
        with suppress(OSError), socket.create_connection(address, timeout=left) as host:
            host.sendall(greeting)
            if _line(host).startswith(GREETING.split()[0] + b" 0 "):
                return
        time.sleep(min(0.2, left))
    raise InputError(f"process 0 does not answer at {coordinator}, or it expects other processes")


def _line(connection: socket.socket) -> bytes:
    """What the other side sends, up to the end of a line; empty for nothing or too much."""
    said = b""
    with suppress(OSError):
        while not said.endswith(b"\n") and len(said) < LONGEST and (part := connection.recv(LONGEST)):
            said += part
    return said if said.endswith(b"\n") else b""
