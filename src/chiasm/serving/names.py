"""Names → addresses, in threads of their own: a name server that does not answer keeps nothing else waiting."""

import socket
from concurrent.futures import ThreadPoolExecutor

from chiasm.serving.turn import Turn


class Lookups:
    """Looks names up.

    Args:
        at_once: names that are looked up at the same time.
        line: that wait for it.
    """

    def __init__(self, at_once: int, line: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="chiasm-names")
        self._turn, self._line = Turn(at_once), line

    async def __call__(self, host: str, port: int) -> list[str]:
        """All addresses of a name.

        Raises:
            ApiError: too many are in line.
            OSError: there is no such name.
        """
        return await self._turn.run(self._threads, self._line, _addresses, host, port)

    def close(self) -> None:
        """Looks nothing up any more; what still hangs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
