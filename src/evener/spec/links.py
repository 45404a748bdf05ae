"""Which declared links lie between two groups of devices. No torch.

A link names two devices, two hosts (the part of a device's name before the slash, `localhost` where it has none), or
`*` twice: any two hosts. The most particular that fits is the one that counts.
"""

from collections.abc import Iterable, Sequence

from evener.spec.cluster import Link

ANY = "*"


def host_of(device: str) -> str:
    """`node1/cuda:0` -> `node1`, `cpu:0` -> `localhost`."""
    host, slash, _ = device.partition("/")
    return host if slash else "localhost"


class Links:
    """Declared links, found by the names of two devices."""

    def __init__(self, links: Iterable[Link]) -> None:
        self._by_ends: dict[tuple[str, str], list[Link]] = {}
        for link in links:
            for ends in {(link.a, link.b), (link.b, link.a)}:
                self._by_ends.setdefault(ends, []).append(link)

    def between(self, here: Sequence[str], there: Sequence[str]) -> list[Link]:
        """Every link that joins a device of `here` and another of `there`, each once."""
        if not self._by_ends:
            return []
        found: dict[int, Link] = {}
        for a in here:
            for b in there:
                if a != b:
                    found.update((id(link), link) for link in self._joining(a, b))
        return list(found.values())

    def _joining(self, a: str, b: str) -> list[Link]:
        for ends in ((a, b), (host_of(a), host_of(b))):
            if ends in self._by_ends:
                return self._by_ends[ends]
        return self._by_ends.get((ANY, ANY), []) if host_of(a) != host_of(b) else []
