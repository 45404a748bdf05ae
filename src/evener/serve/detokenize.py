"""Tokens to text while they come: no half characters, no part of a stop string.

The text of a sequence does not depend on how its tokens are cut into answers (a law, tested): a stop string
counts at the character that completes it, and of two completed there, the one that began earlier.
"""

import codecs

from evener.serve.vocabulary import Vocabulary


class Detokenizer:
    """Incremental text of one sequence.

    `decoded` counts the characters decoded so far, `emitted` those handed out; the difference is held back,
    because it may be the beginning of a stop string. After `stop` is set, feed nothing more.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._vocabulary = vocabulary
        self._stops = stops
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.decoded = 0
        self.emitted = 0
        self.stop: str | None = None
        """The stop string that appeared."""

    def feed(self, token: int) -> str:
        """Text that is certain after one more token; often empty."""
        if self._skip_special and self._vocabulary.is_special(token):
            return ""
        return self._advance(self._utf8.decode(self._vocabulary.bytes_of(token)))

    def finish(self) -> str:
        """What is still held when the sequence ends; an incomplete character becomes U+FFFD."""
        text = self._advance(self._utf8.decode(b"", final=True))
        if self.stop is None:
            text += self._held
            self.emitted += len(self._held)
            self._held = ""
        return text

    def _advance(self, new: str) -> str:
        self.decoded += len(new)
        if not self._stops:
            self.emitted += len(new)
            return new
        text = self._held + new
        found = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            end, start, self.stop = min(found)
            text, self._held = text[: end if self._include_stop else start], ""
        else:
            keep = len(text) - _open_suffix(text, self._stops)
            text, self._held = text[:keep], text[keep:]
        self.emitted += len(text)
        return text


def _open_suffix(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which a stop string may begin."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
