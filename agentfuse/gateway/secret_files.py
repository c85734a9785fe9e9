"""Secrets that the operator gives, each in a file of its own."""

from __future__ import annotations

from pathlib import Path

from agentfuse.errors import ConfigError

_MIN_BYTES = 32


def secret_in(path: Path, key: str) -> bytes:
    """What the file holds that the configuration names by ``key``. Raises ``ConfigError``."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError([f"gateway.{key}: {path}: {error.strerror}; correct the path"]) from None
    if len(secret) < _MIN_BYTES:
        raise ConfigError(
            [f"gateway.{key}: fewer than {_MIN_BYTES} bytes; make some with openssl rand -hex 32"]
        )
    return secret
