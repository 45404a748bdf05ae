"""KV block accounting: who holds which block, and which blocks can be read by a later prompt.

Only numbers live here; the tensors live with the workers. A block is *free* (never written or forgotten),
*cached* (nobody holds it, its content is still indexed; evicted least recently used first) or *held* (`refs` > 0).
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

Key = bytes | int
"""Identity of a whole block: a digest chained over all tokens up to its end, or a given identity."""


def chain_key(parent: Key | None, tokens: Sequence[int]) -> bytes:
    """Digest of one block given the digest of the block before it.

    A cryptographic hash, because a client could otherwise forge a collision and read another client's prompt.
    """
    h = blake2b(parent if isinstance(parent, bytes) else b"", digest_size=16)
    h.update(array("q", tokens).tobytes())
    return h.digest()


class BlockPool:
    """All KV blocks of one replica; block numbers are valid on every one of its shards.

    Laws: a block is in exactly one of free, cached, held; `available` + held == `n_blocks`.
    """

    def __init__(self, n_blocks: int, prefix_caching: bool = True) -> None:
        self.n_blocks = n_blocks
        self.prefix_caching = prefix_caching
        self._free = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * n_blocks
        self._keys: list[Key | None] = [None] * n_blocks
        self._index: dict[Key, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, and cached ones after eviction."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Hold `count` blocks, evicting cached ones if need be; None (and no change) if there are too few."""
        if count > self.available:
            return None
        free, refs = self._free, self._refs
        out = free[: -count - 1 : -1]
        del free[len(free) - len(out) :]
        while len(out) < count:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            out.append(block)
        for block in out:
            refs[block] = 1
        return out

    def find(self, keys: Sequence[Key]) -> list[int]:
        """Blocks of the longest indexed run of `keys`, not yet held."""
        out: list[int] = []
        if self.prefix_caching:
            for key in keys:
                block = self._index.get(key)
                if block is None:
                    break
                out.append(block)
        return out

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for each of these blocks (found ones)."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def cached_among(self, blocks: Sequence[int]) -> int:
        """How many of these found blocks nobody holds: holding them takes that many from `available`."""
        return sum(self._refs[b] == 0 for b in blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less. The end of a prefix is evicted before its beginning."""
        refs, keys, free = self._refs, self._keys, self._free
        for block in reversed(blocks):
            left = refs[block] = refs[block] - 1
            if left == 0:
                if keys[block] is None:
                    free.append(block)
                else:
                    self._cached[block] = None
            assert left >= 0, f"block {block} released twice"

    def publish(self, block: int, key: Key) -> None:
        """Make a held, whole block findable. A second block with the same content stays private."""
        if self.prefix_caching and self._keys[block] is None and key not in self._index:
            self._index[key] = block
            self._keys[block] = key

    def withdraw(self, block: int) -> None:
        """Its content cannot be trusted any more (the batch that wrote it failed)."""
        self._forget(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = None
