"""What of payloads people are not shown: values whose names sound secret, and ids of workflows, which are capabilities."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import msgspec

from durable_cluster.context import short_id

MASK = "•••"
NAMES = (
    *("pass_word", "passwd", "pwd", "pass_phrase", "pass_code", "secret", "token", "credential", "authorization"),
    *("auth", "bearer", "cookie", "session_id", "api_key", "access_key", "private_key", "signing_key", "secret_key"),
    *("encryption_key", "signature", "otp", "pin", "card", "credit_card", "cvv", "cvc", "iban", "ssn"),
)
"""Each as its words: where those run together it is the same name."""
WORD_ENDS = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[A-Z][a-z]|[0-9])|(?<=[0-9])(?=[a-zA-Z])|[\W_]+")
WHOLE_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}(?![0-9a-f])", re.IGNORECASE)
DEPTH_MAX = 100


class Secret(msgspec.Struct, frozen=True):
    """The names of one, and of several, as they are searched for among the words of a name."""

    one: re.Pattern[str]
    several: re.Pattern[str]

    def hides(self, name: str, content: Any) -> bool:
        """Whether ``content`` is masked. None and booleans are shown, and so is how many of something there are."""
        if content is None or isinstance(content, bool):
            return False
        words = f"_{_words(name)}_"
        if self.one.search(words):
            return True
        return not isinstance(content, int | float) and self.several.search(words) is not None


def redacted(value: Any, names: Iterable[str] = ()) -> Any:
    """A copy of plain JSON values in which what has a secret name is masked, whatever it holds, and ids are truncated.

    A name is secret when its words contain those of one of ``NAMES`` or ``names``, in any spelling, and their plurals: "apiKeys",
    "X-Api-Key", "old_password2"; but "discarded" is not "card", and "max_tokens": 4096 is a number of tokens and none of them.
    """
    return _redacted(value, _secret((*NAMES, *names)), 0)


def _redacted(value: Any, secret: Secret, depth: int) -> Any:
    if depth > DEPTH_MAX:
        return MASK
    if isinstance(value, dict):
        return {
            _redacted(key, secret, depth + 1): (
                MASK if secret.hides(str(key), content) else _redacted(content, secret, depth + 1)
            )
            for key, content in value.items()
        }
    if isinstance(value, list):
        return [_redacted(one, secret, depth + 1) for one in value]
    return truncated(value) if isinstance(value, str) else value


def truncated(text: str) -> str:
    """The same without whole ids, in whatever way they are written."""
    return WHOLE_ID.sub(lambda found: f"{short_id(found[0].replace('-', '').lower())}…", text)


@lru_cache(maxsize=4)
def _secret(names: tuple[str, ...]) -> Secret:
    known = [_words(name) for name in names]
    return Secret(_among_words(known), _among_words(map(_plural, known)))


def _among_words(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"_(?:{'|'.join(name.replace('_', '_?') for name in names)})_")


def _plural(words: str) -> str:
    if re.search("[^aeiou]y$", words):
        return f"{words[:-1]}ies"
    return f"{words}es" if re.search("(s|x|z|ch|sh)$", words) else f"{words}s"


def _words(name: str) -> str:
    return WORD_ENDS.sub("_", name).strip("_").lower()
