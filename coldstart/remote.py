"""A folder of files somewhere else: what a download needs of an object store, and what an address may look like."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from contracts.errors import ConfigError, CorruptCheckpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.source import ByteSource

#: Scheme of an address -> what answers there.
SCHEMES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "az": "azure",
    "azure": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "https": "http",
    "http": "http",
}
#: A file that is read whole into memory (an index, a config, a tokenizer) is not larger.
MAX_SMALL_BYTES = 256 << 20
#: A model folder has a few dozen files; sharded ones some hundreds.
MAX_FILES = 10_000

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@=-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as it stood when it was looked at. Two are equal when nothing says that it was changed."""

    name: str
    num_bytes: int
    #: The store's name of this content; None where it gives none.
    e_tag: str | None = None
    #: Unix time of the last change, as the store tells it.
    modified_s: float = 0.0


class RemoteFolder(Protocol):
    """Methods block, may be called by several threads, and raise LoadError, CorruptCheckpoint for names that are no
    file names, ConfigError for addresses and settings that cannot work."""

    @property
    def name(self) -> str:
        """The address; it has no secrets."""
        ...

    def files(self) -> Sequence[RemoteFile]:
        """Those in the folder itself, sorted by name. A store that cannot list answers with those of the usual names
        that are there."""
        ...

    def look(self, name: str) -> RemoteFile | None:
        """One file as it stands now; None where there is none."""
        ...

    def open(self, file: RemoteFile) -> ByteSource:
        """Reads of another content than `file` was raise LoadError that says so."""
        ...

    def close(self) -> None:
        """Idempotent. No read may be under way."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """`s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `https://host/path`."""

    url: str
    scheme: str

    @property
    def kind(self) -> str:
        """A value of `SCHEMES`."""
        return SCHEMES[self.scheme]


def is_remote(text: str) -> bool:
    """Whether this names an object store rather than a folder of this machine."""
    return urlsplit(text).scheme.lower() in SCHEMES


def parse_address(text: str) -> Address:
    """Raises ConfigError, which never repeats a part of `text` that may be a secret."""
    parts = urlsplit(text)
    scheme = parts.scheme.lower()
    if scheme not in SCHEMES:
        raise ConfigError(f"no object store is reached by {scheme or 'an address without a scheme'!r}: {_schemes()}")
    shown = f"{scheme}://{parts.hostname or ''}{parts.path}"
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{shown}: credentials go into the environment, not into an address, which is shown and kept")
    if parts.query or parts.fragment:
        raise ConfigError(f"{shown}: an address has no query; signatures and tokens go into the environment")
    if not parts.hostname:
        raise ConfigError(f"{shown}: names no bucket or host")
    return Address(url=f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}", scheme=scheme)


def check_name(name: str, where: str) -> str:
    """`name`, which becomes a file's name here. Raises CorruptCheckpoint: it came from elsewhere and could point
    anywhere."""
    if not _NAME.fullmatch(name):
        raise CorruptCheckpoint(f"{where}: {name[:200]!r} is no name of a checkpoint's file")
    return name


def read_small(folder: RemoteFolder, file: RemoteFile, *, limit_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """All of a file. Raises CorruptCheckpoint where it is larger than `limit_bytes`, and LoadError."""
    if file.num_bytes > limit_bytes:
        raise CorruptCheckpoint(f"{folder.name}/{file.name}: {file.num_bytes} bytes; at most {limit_bytes} make sense")
    source = folder.open(file)
    try:
        data = bytearray(file.num_bytes)
        source.read_into(0, data)
        return bytes(data)
    finally:
        source.close()


def _schemes() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES)
