"""Takes secrets out of what leaves this process: run parameters, tags, uploaded files.

Three things count as secret: a value whose key says so (`hub_token`, `api_key`, `password`), the credentials of a
URL (`https://user:password@host`), and the values of this process's environment variables with such keys (`HF_TOKEN`),
wherever they turn up, as do strings in the form of a Hugging Face token.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, overload

REDACTED = "<redacted>"

_SECRET_KEY = (
    r"[\w.-]*(?:secret|passwd|password|passphrase|api_?-?key|access_?-?key|private_?-?key|credentials?)[\w.-]*"
)
_TOKEN_KEY = r"(?:[\w.-]*[_.-])?token"
# Tokens of the vocabulary, not of an account: transformers' and TRL's own names.
_VOCABULARY_TOKEN = re.compile(
    r"^(?:.*_)?(?:eos|bos|pad|unk|sep|cls|mask|image|video|audio|vision_\w+|stop|eot|end_of_turn|per|next|last|first)_token$"
)
_IS_SECRET_KEY = re.compile(rf"^(?:{_SECRET_KEY}|{_TOKEN_KEY})$", re.IGNORECASE)
_HUGGING_FACE_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_URL_CREDENTIALS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@\"']+@", re.IGNORECASE)
# `--hub_token X`, `hub_token=X`, `"hub_token": "X"`, `?token=X`: the key, what separates, the value.
_ASSIGNMENT = re.compile(
    rf"(?P<key>\b(?:{_SECRET_KEY}|{_TOKEN_KEY}))(?P<between>[\"']?\s*[=:]\s*[\"']?)(?P<value>[^\s\"'&,;}}\]]+)",
    re.IGNORECASE,
)
_FLAG = re.compile(
    rf"(?P<between>--?)(?P<key>{_SECRET_KEY}|{_TOKEN_KEY})(?P<space>\s+)(?P<value>\"[^\"]*\"|'[^']*'|[^\s-]\S*)",
    re.IGNORECASE,
)
# Shorter values ("1", "true", "none") are words that a text may hold for other reasons.
_MIN_SECRET_CHARACTERS = 8


def is_secret_key(key: str) -> bool:
    """True if a value under this name must not be shown: `hub_token` is, `eos_token` and `max_new_tokens` are not."""
    return bool(_IS_SECRET_KEY.match(key)) and not _VOCABULARY_TOKEN.match(key.lower())


def redact_known_secrets(text: str) -> str:
    """Replaces the secrets of this process's environment, URL credentials and Hugging Face tokens in `text`.

    Unlike `redact` it does not go by keys, so that it leaves data alone (a caption may say "token: gold").
    """
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    text = _HUGGING_FACE_TOKEN.sub(REDACTED, text)
    return _URL_CREDENTIALS.sub(rf"\1{REDACTED}@", text)


@overload
def redact(value: str) -> str: ...
@overload
def redact(value: Mapping[str, Any]) -> dict[str, Any]: ...
def redact(value: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """Returns `value` without secrets.

    Args:
        value: a text such as a command line, or a mapping of settings (nested mappings and lists are followed;
            unset secrets, None, False and "", stay as they are).
    """
    if isinstance(value, str):
        return _redact_text(value)
    return {key: _redact_entry(key, entry) for key, entry in value.items()}


def _redact_entry(key: str, entry: Any) -> Any:
    if is_secret_key(str(key)) and entry not in (None, "") and not isinstance(entry, bool):
        return REDACTED
    return _redact_value(entry)


def _redact_value(value: Any) -> Any:
    if isinstance(value, str | Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return value


def _redact_text(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if not is_secret_key(match["key"]):
            return match[0]
        return match[0][: match.start("value") - match.start()] + REDACTED

    return _FLAG.sub(replace, _ASSIGNMENT.sub(replace, redact_known_secrets(text)))


def _environment_secrets() -> list[str]:
    """Values of the environment's secrets, longest first, so that one that contains another goes whole."""
    values = {value for key, value in os.environ.items() if is_secret_key(key) and len(value) >= _MIN_SECRET_CHARACTERS}
    return sorted(values, key=len, reverse=True)
