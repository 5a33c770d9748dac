"""How a section's bytes are kept, by name. More codecs may join a registry; a file names those that it needs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import zstandard

from contracts.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

#: What a codec must make a section smaller by; less is not worth the time that reading it takes.
LEAST_GAIN = 1 / 8
_ZSTD_LEVEL = 1


class SectionCodec(Protocol):
    """Loses nothing. Safe for several threads at once."""

    @property
    def name(self) -> str:
        """Stands in files: never given to another codec."""
        ...

    def encode(self, data: memoryview) -> Buffer: ...

    def decode(self, data: memoryview, num_bytes: int) -> Buffer:
        """Exactly `num_bytes`, and takes no memory for more. Raises LoadError for what `encode` did not make."""
        ...


class RawCodec:
    name = "raw"

    def encode(self, data: memoryview) -> memoryview:
        return data

    def decode(self, data: memoryview, num_bytes: int) -> memoryview:
        if len(data) != num_bytes:
            raise LoadError(f"{len(data)} bytes stand for {num_bytes}")
        return data


class _Contexts(threading.local):
    """Dear to make, and not for two threads at once."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


class ZstdCodec:
    name = "zstd"

    def __init__(self) -> None:
        self._contexts = _Contexts()

    def encode(self, data: memoryview) -> bytes:
        return self._contexts.compressor.compress(data)

    def decode(self, data: memoryview, num_bytes: int) -> bytes:
        try:
            # Looked at first: memory is taken for as much as the frame names.
            told = zstandard.frame_content_size(data)
            if told != num_bytes:
                raise LoadError(f"a frame of {told} bytes stands for {num_bytes}")
            found = self._contexts.decompressor.decompress(data)
        except zstandard.ZstdError as error:
            raise LoadError(f"a zstd frame cannot be read: {error}") from error
        if len(found) != num_bytes:
            raise LoadError(f"a frame held {len(found)} bytes instead of {num_bytes}")
        return found


class CodecRegistry:
    def __init__(self, codecs: Iterable[SectionCodec] = ()) -> None:
        self._codecs: dict[str, SectionCodec] = {}
        self.add(RawCodec())
        self.add(ZstdCodec())
        for codec in codecs:
            self.add(codec)

    def add(self, codec: SectionCodec) -> None:
        """Raises ConfigError for a name that is taken."""
        if self._codecs.setdefault(codec.name, codec) is not codec:
            raise ConfigError(f"two codecs of snapshots are named {codec.name!r}")

    def names(self) -> list[str]:
        return list(self._codecs)

    def encode(self, name: str, data: memoryview) -> tuple[str, Buffer]:
        """With the codec of that name, or as it is where little is gained; which it was. Raises ConfigError for a name
        that there is not."""
        if name not in self._codecs:
            raise ConfigError(f"there is no codec {name!r}; known are: {', '.join(self._codecs)}")
        if name == RawCodec.name:
            return name, data
        encoded = self._codecs[name].encode(data)
        with memoryview(encoded) as view:
            gained = view.nbytes <= data.nbytes * (1 - LEAST_GAIN)
        return (name, encoded) if gained else (RawCodec.name, data)

    def decode(self, name: str, data: memoryview, num_bytes: int) -> Buffer:
        """Raises LoadError, also for a codec that is not known here."""
        codec = self._codecs.get(name)
        if codec is None:
            raise LoadError(f"codec {name!r} is not known here; known are: {', '.join(self._codecs)}")
        return codec.decode(data, num_bytes)
