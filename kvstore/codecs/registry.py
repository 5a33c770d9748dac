"""The codecs by name and by the number that stands in files; how a block is written and read with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

from contracts.errors import ConfigError, CorruptKv
from kvstore.codecs import frame
from kvstore.codecs.integer import IntegerForm
from kvstore.codecs.plain import PlanesForm, RawForm
from kvstore.codecs.values import check_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.layout import BlockLayout


class BodyForm(Protocol):
    """How the numbers of blocks of one layout stand in a frame. Safe for several threads at once."""

    def encode(self, block: memoryview) -> list[bytes] | None:
        """The body, in parts; None where this form cannot say what the block holds."""
        ...

    def decode(self, body: memoryview, into: memoryview) -> None:
        """Raises CorruptKv."""
        ...


@dataclass(frozen=True, slots=True)
class CodecKind:
    #: Stands in files: never given to another codec.
    codec_id: int
    name: str
    #: For the lossy class alone: what is decoded is near what was encoded, not equal to it.
    lossy: bool
    form: Callable[[BlockLayout], BodyForm]


RAW = CodecKind(0, "raw", lossy=False, form=RawForm)

CODECS: dict[int, CodecKind] = {
    kind.codec_id: kind
    for kind in (
        RAW,
        CodecKind(1, "int8", lossy=True, form=partial(IntegerForm, bits=8)),
        CodecKind(2, "int4", lossy=True, form=partial(IntegerForm, bits=4)),
        CodecKind(3, "zstd", lossy=False, form=PlanesForm),
    )
}

_BY_NAME = {kind.name: kind for kind in CODECS.values()}


@lru_cache(maxsize=64)
def _form(codec_id: int, layout: BlockLayout) -> BodyForm:
    return CODECS[codec_id].form(layout)


class BlockCodec:
    """One codec for blocks of one layout. Safe for several threads at once; the costly parts run without the GIL."""

    def __init__(self, kind: CodecKind, layout: BlockLayout) -> None:
        """Raises ConfigError for a layout that the codec cannot take."""
        self.codec_id = kind.codec_id
        self.name = kind.name
        self.lossy = kind.lossy
        self.layout = layout
        self._form = _form(kind.codec_id, layout)

    def encode(self, block: memoryview) -> bytes:
        """A frame that says by itself how to read it: the same bytes for the same block, in every process.

        A block that the codec would not make smaller, or whose numbers are not all finite, is framed as it is. Raises
        BadRequest where `block` is not one block of the layout.
        """
        check_size(block, self.layout)
        parts = self._form.encode(block)
        if parts is None or (self.codec_id != RAW.codec_id and sum(map(len, parts)) >= block.nbytes):
            return frame.pack(RAW.codec_id, self.layout, [bytes(block)])
        return frame.pack(self.codec_id, self.layout, parts)

    def decode(self, data: bytes | memoryview, into: memoryview) -> None:
        """As `decode_block`: what another codec wrote is read too."""
        decode_block(data, self.layout, into)


def make_codec(name: str, layout: BlockLayout) -> BlockCodec:
    """Raises ConfigError for a name that there is not, and a layout that the codec cannot take."""
    kind = _BY_NAME.get(name)
    if kind is None:
        raise ConfigError(f"there is no codec {name!r}; known are: {', '.join(_BY_NAME)}")
    return BlockCodec(kind, layout)


def encode_block(block: memoryview, layout: BlockLayout, name: str) -> bytes:
    """`BlockCodec.encode` of the codec with this name."""
    return make_codec(name, layout).encode(block)


def decode_block(data: bytes | memoryview, layout: BlockLayout, into: memoryview) -> int:
    """Writes the block that `data` encodes, and returns the id of its codec.

    Raises CorruptKv for whatever is not exactly a frame of this layout, and BadRequest where `into` is not one block
    of it.
    """
    check_size(into, layout)
    codec_id, body = frame.unpack(data, layout)
    if codec_id not in CODECS:
        raise CorruptKv(f"an encoded block names codec {codec_id}; known are {sorted(CODECS)}")
    _form(codec_id, layout).decode(body, into.cast("B"))
    return codec_id
