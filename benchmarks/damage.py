"""Ways to damage files: each takes the bytes of a sound file and a generator, and gives other bytes."""

import gzip
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Some bytes replaced."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Truncated, or a part taken out."""
    begin = rng.randrange(len(data) + 1)
    return data[:begin] + (data[rng.randrange(begin, len(data) + 1) :] if rng.random() < 0.5 else b"")


def grown(data: bytes, rng: random.Random) -> bytes:
    """With foreign bytes put in, or a part repeated."""
    place = rng.randrange(len(data) + 1)
    foreign = rng.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{" * 2000, b"[" * 2000, b'"', b"\n" * 50, data[:200]))
    return data[:place] + foreign + data[place:]


def _evil(rng: random.Random) -> Any:
    """A value of an unexpected type or size."""
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    return rng.choice(
        (
            *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**9, 10**30, 0.5, -0.0, 1e308, float("nan")),
            *(float("inf"), "", "x", "auto", "../../x", "/", "\ud800", "\0", "x" * 10_000, "1", "{{", "cuda:9"),
            *([], [None], ["x"], [[]], [0] * 1000, {}, {"x": None}, {"": {}}, deep),
        )
    )


def json_changed(data: bytes, rng: random.Random) -> bytes:
    """One or more values of a JSON document replaced, removed or moved; bytes that are no JSON are flipped."""
    try:
        document = json.loads(data)
    except ValueError:
        return flipped(data, rng)
    return json.dumps(_changed(document, rng)).encode("utf-8")


def _changed(document: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(document))
        if not places or rng.random() < 0.03:
            return _evil(rng)
        holder, key = rng.choice(places)
        act = rng.random()
        if act < 0.65:
            holder[key] = _evil(rng)
        elif act < 0.8:
            del holder[key]
        elif act < 0.9:
            other, place = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[place])) if _has(other, place) else None
        elif isinstance(holder, dict):
            holder[f"{key}_x"] = holder.pop(key)
        else:
            holder.insert(key, _evil(rng))
    return document


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(entries):
        yield value, key
        if key != "vocab":
            yield from _places(one)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def lines_changed(data: bytes, rng: random.Random) -> bytes:
    """One line's JSON changed, or lines removed, repeated and joined."""
    lines = data.splitlines()
    if not lines:
        return data
    place = rng.randrange(len(lines))
    act = rng.random()
    if act < 0.7:
        lines[place] = json_changed(lines[place], rng)
    elif act < 0.85:
        lines[place] = lines[place] * 3
    else:
        del lines[place]
    return b"\n".join(lines)


def header_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, whose length is right or wrong."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json_changed(data[8 : 8 + length], rng)
    claimed = len(header) if rng.random() < 0.8 else rng.choice((0, 1, len(data), 2**40, 2**64 - 1))
    return struct.pack("<Q", claimed) + header + data[8 + length :]


def body_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with other values."""
    length = 8 + int(struct.unpack("<Q", data[:8])[0])
    return data[:length] + rng.choice((flipped, cut, grown))(data[length:], rng)


def yaml_changed(data: bytes, rng: random.Random) -> bytes:
    """A line of YAML with another value, tag, anchor or expression."""
    lines = data.decode("utf-8").splitlines()
    place = rng.randrange(len(lines))
    key = lines[place].partition(":")[0]
    values = (
        *(json.dumps(_evil(rng)), "!!timestamp 99999-01-01", "!!python/object:x {}", "&a [*a]", "0b_", "2001-99-99"),
        *("['(a+)+$']", "['^(([a-z._0-9])+)+$!']", "['(?:a{9999}){9999}']", f"['{'(' * 500}']", "~", "? x", "*a", "<<"),
    )
    lines[place] = f"{key}: {rng.choice(values)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def template_changed(data: bytes, rng: random.Random) -> bytes:
    """A chat template that asks for much, for what is not there, or for Python's inside."""
    parts = (
        *(
            "{{ 'x' * 1000000000 }}",
            "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        ),
        *(
            "{{ messages.__class__.__mro__ }}",
            "{{ [1] * 10**9 }}",
            "{{ 1/0 }}",
            "{{ x.y.z }}",
            "{{ 9**9**9 }}",
            "{% if",
        ),
        *("{{ raise_exception('no') }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '%1000000000d' % 1 }}"),
        *("{{ messages[9]['content'] }}", "{{ m.content + 1 }}", "{{ '\ud7ff' }}", "{{ lipsum(n=100000) }}"),
    )
    text = data.decode("utf-8")
    place = rng.choice((0, text.index("{{"), text.index("\n"), len(text)))
    return (text[:place] + rng.choice(parts) + text[place:]).encode("utf-8")


def unpacked_larger(data: bytes, rng: random.Random) -> bytes:
    """A gzip file of 256 megabytes of one character, or of damaged lines."""
    if rng.random() < 0.3:
        return gzip.compress(rng.choice((b"x", b"[", b"\n", b"\0")) * 256_000_000, 1)
    return gzip.compress(lines_changed(gzip.decompress(data), rng))
