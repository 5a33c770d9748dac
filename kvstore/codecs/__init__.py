"""Codecs of KV blocks, for the wire and for disks: see docs/codecs.md."""

from __future__ import annotations

from kvstore.codecs.choice import CodecChoice, CodecCosts, choose_codec, measure_codec
from kvstore.codecs.registry import CODECS, RAW, BlockCodec, CodecKind, decode_block, encode_block, make_codec
from kvstore.codecs.window import DEFAULT_WINDOW_TOKENS, num_lossy_blocks

__all__ = [
    "CODECS",
    "DEFAULT_WINDOW_TOKENS",
    "RAW",
    "BlockCodec",
    "CodecChoice",
    "CodecCosts",
    "CodecKind",
    "choose_codec",
    "decode_block",
    "encode_block",
    "make_codec",
    "measure_codec",
    "num_lossy_blocks",
]
