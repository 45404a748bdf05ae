"""What the simulated workers of one replica know: who is in which slot and group, and how long answers really are."""

import heapq

from evener.engine.batch import Batch


class Row:
    """One slot."""

    __slots__ = ("ends_after", "group", "joined_at", "ready", "sampled")

    def __init__(self, sampled: int, ends_after: int) -> None:
        self.sampled = sampled
        self.ends_after = ends_after
        self.group: Group | None = None
        self.joined_at = 0
        self.ready = 0
        """When its newest token is known to the first stage."""


class Group:
    """Rows that decode together."""

    __slots__ = ("ends", "ready", "slots", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.slots: dict[int, Row] = {}
        self.ends: list[tuple[int, int]] = []
        """(step that samples the end of sequence, slot); those of rows that left are void."""
        self.ready = 0

    def let_go(self, slot: int) -> None:
        """A slot leaves; its row learns what it sampled here."""
        row = self.slots.pop(slot, None)
        if row is not None and row.group is self:
            row.sampled += self.steps - row.joined_at
            row.ready = max(row.ready, self.ready)
            row.group = None


class Rows:
    """Follows the batches of one replica, as its workers would."""

    __slots__ = ("groups", "slots", "truth")

    def __init__(self, truth: dict[str, int]) -> None:
        """`truth`: request id -> output tokens before the end of sequence."""
        self.truth = truth
        self.slots: dict[int, Row] = {}
        self.groups: dict[int, Group] = {}

    def apply(self, batch: Batch) -> tuple[list[tuple[int, int]], int, Group | None]:
        """Apply a batch: (slots that end with their output lengths, when its input tokens are known, group stepped)."""
        slots = self.slots
        for slot in batch.drop:
            slots.pop(slot, None)
        for new in batch.new:
            slots[new.slot] = Row(new.n_tokens - new.prompt_len, self.truth[new.request_id])
        needs = 0
        ended: list[tuple[int, int]] = []
        group: Group | None = None
        if batch.group >= 0:
            group = self.groups.get(batch.group)
            if group is None:
                group = self.groups[batch.group] = Group()
            for slot in batch.leave:
                group.let_go(slot)
            for slot in batch.join:
                needs = max(needs, self._join(group, slot))
            if batch.step:
                needs = max(needs, group.ready)
                self.step(group, ended)
        for chunk in batch.chunks:
            if chunk.sample:
                row = slots[chunk.slot]
                if row.sampled == row.ends_after:
                    ended.append((chunk.slot, row.ends_after))
                row.sampled += 1
        return ended, needs, group if batch.step else None

    def _join(self, group: Group, slot: int) -> int:
        row = self.slots[slot]
        if row.group is not None:  # its old group has had no batch to say so since
            row.group.let_go(slot)
        row.group, row.joined_at = group, group.steps
        group.slots[slot] = row
        heapq.heappush(group.ends, (group.steps + max(0, row.ends_after - row.sampled), slot))
        return row.ready

    def step(self, group: Group, ended: list[tuple[int, int]]) -> None:
        """All rows of a group sample a token; those whose end it is are appended to `ended`."""
        while group.ends and group.ends[0][0] <= group.steps:
            _, slot = heapq.heappop(group.ends)
            found = group.slots.get(slot)
            # A slot that left and came back has a stale entry beside its own.
            if found is not None and found.sampled + group.steps - found.joined_at == found.ends_after:
                found.ends_after = -1 - found.ends_after
                ended.append((slot, -1 - found.ends_after))
        group.steps += 1
