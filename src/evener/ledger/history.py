"""What held from when on: a list of changes that is forgotten as its readers pass."""

from bisect import bisect_right


class History:
    """A value over time. Changes come in order; readers ask for times that no one has dropped."""

    __slots__ = ("_times", "_values")

    def __init__(self, start: int, value: int) -> None:
        self._times = [start]
        self._values = [value]

    def __len__(self) -> int:
        return len(self._times)

    @property
    def last(self) -> int:
        """The newest value."""
        return self._values[-1]

    def change(self, now: int, value: int) -> None:
        """From `now` on it is `value`; of two changes at one time the later holds."""
        assert now >= self._times[-1], f"change at {now} after one at {self._times[-1]}"
        if value == self._values[-1]:
            return
        if now == self._times[-1]:
            self._values[-1] = value
        else:
            self._times.append(now)
            self._values.append(value)

    def pieces(self, since: int, until: int) -> list[tuple[int, int, int]]:
        """(from, to, value) that tile [since, until)."""
        times, values = self._times, self._values
        k = bisect_right(times, since) - 1
        assert k >= 0, f"{since} is before {times[0]}: this history is forgotten"
        if k + 1 == len(times) or times[k + 1] >= until:
            return [(since, until, values[k])]
        out = []
        while since < until:
            k += 1
            end = times[k] if k < len(times) and times[k] < until else until
            out.append((since, end, values[k - 1]))
            since = end
        return out

    def since(self, when: int) -> bool:
        """The newest value holds at `when` already."""
        return self._times[-1] <= when

    def forget(self, before: int) -> None:
        """Drop what nobody asks for any more: all readers have passed `before`."""
        k = bisect_right(self._times, before) - 1
        if k > 0:
            del self._times[:k], self._values[:k]
