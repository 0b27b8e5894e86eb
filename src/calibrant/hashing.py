"""Content hashes and canonical JSON, which identify everything that is recorded."""

import hashlib
import json
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def sha256_bytes(*parts: bytes | memoryview) -> str:
    """Hex SHA-256 of the concatenation of ``parts``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any, allow_nan: bool = False) -> str:
    """JSON with sorted keys, two-space indent and a final newline; equal values give equal text.

    ``allow_nan`` writes Infinity and NaN, which are not JSON, as Python and transformers do.
    """
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def sha256_json(value: Any, allow_nan: bool = False) -> str:
    """Hex SHA-256 of ``value`` as JSON with sorted keys and no spaces; ``allow_nan`` as in ``canonical_json``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=allow_nan)
    return sha256_bytes(text.encode())
