"""Folders and files of object stores: S3 and what speaks like it, Google Cloud Storage, Azure, plain HTTP(S).

Requests are made by obstore, which signs them with what the environment says (AWS_*, GOOGLE_*, AZURE_*); when they are
asked again is decided here (`coldstart.remote_retry`), since only here it is known which bytes came already. Errors
tell what happened and never repeat what a store or a library said: that can hold a signed address.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import obstore
from obstore import exceptions as store_errors

from coldstart.loop_thread import LoopThread
from coldstart.object_requests import Failed, StoreSettings, check_same, fault_of, open_store, pin, remote_file
from coldstart.remote import MAX_FILES, check_name, parse_address
from coldstart.remote_retry import Fault, next_step
from contracts.errors import LoadError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Sequence

    from obstore import GetOptions, GetResult
    from typing_extensions import Buffer

    from coldstart.remote import RemoteFile
    from contracts.clock import Clock

T = TypeVar("T")

#: What a folder of a plain web server, which cannot be listed, is asked for.
USUAL_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tandem-index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

#: A stream hands bytes on in pieces of at least this; a connection that breaks loses less than one. Smaller ones cost a
#: turn of the loop each, which a fast network with small packets would wait for.
STREAM_BYTES = 64 << 10


class ObjectFolder:
    """`coldstart.remote.RemoteFolder` over an object store. Requests are made in a thread of its own."""

    def __init__(self, url: str, *, clock: Clock, rng: random.Random, settings: StoreSettings | None = None) -> None:
        """Asks nothing yet. Raises ConfigError."""
        self._settings = settings or StoreSettings()
        self._address = parse_address(url)
        self._clock = clock
        self._rng = rng
        self._store = open_store(self._address, self._settings)
        self._loop = LoopThread()
        num_requests = max(1, self._settings.max_in_flight_bytes // self._settings.piece_bytes)
        self._slots = asyncio.Semaphore(num_requests)

    def __repr__(self) -> str:
        return f"<ObjectFolder {self.name}>"

    @property
    def name(self) -> str:
        return self._address.url

    def files(self) -> Sequence[RemoteFile]:
        if self._address.kind == "http":
            return self._loop.run(self._present(USUAL_NAMES))
        listed: list[RemoteFile] = self._loop.run(self._insist("the folder", self._list))
        if len(listed) > MAX_FILES:
            raise LoadError(f"{self.name}: {len(listed)} files; at most {MAX_FILES} are a model")
        for file in listed:
            check_name(file.name, self.name)
        return listed

    def look(self, name: str) -> RemoteFile | None:
        check_name(name, self.name)
        return self._loop.run(self._insist(name, lambda: self._head(name)))

    def open(self, file: RemoteFile) -> ObjectSource:
        check_name(file.name, self.name)
        return ObjectSource(self, file)

    def close(self) -> None:
        self._loop.close()

    # --- for ObjectSource ---------------------------------------------------------------------------------

    def read_into(self, file: RemoteFile, offset: int, view: memoryview) -> None:
        self._loop.run(self._read(file, offset, view))

    def read_whole(self, file: RemoteFile) -> bytes:
        """In one stream, for servers that know no ranges."""
        data = bytearray(file.num_bytes)
        self._loop.run(self._insist(file.name, lambda: self._stream_whole(file, memoryview(data))))
        return bytes(data)

    @property
    def settings(self) -> StoreSettings:
        return self._settings

    # --- on the loop --------------------------------------------------------------------------------------

    async def _list(self) -> list[RemoteFile]:
        answer = await obstore.list_with_delimiter_async(self._store)  # pyright: ignore[reportUnknownMemberType]
        objects = cast("Sequence[dict[str, Any]]", answer["objects"])
        found = [remote_file(str(each["path"]), each) for each in objects]
        return sorted((file for file in found if file.name), key=lambda file: file.name)

    async def _head(self, name: str) -> RemoteFile | None:
        try:
            meta = await obstore.head_async(self._store, name)
        except FileNotFoundError:
            return None
        return remote_file(name, cast("dict[str, Any]", meta))

    async def _present(self, names: Sequence[str]) -> list[RemoteFile]:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._insist(name, self._asker(name))) for name in names]
        return [file for task in asked if (file := task.result()) is not None]

    def _asker(self, name: str) -> Callable[[], Coroutine[Any, Any, RemoteFile | None]]:
        return lambda: self._head(name)

    async def _insist(self, what: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The answer to a small question, asked until it comes."""
        deadline_s = self._clock.now_s() + self._settings.read_deadline_s
        num_fruitless = 0
        while True:
            try:
                async with self._slots, asyncio.timeout(self._settings.request_timeout_s):
                    return await ask()
            except (store_errors.BaseError, OSError, TimeoutError, Failed) as error:
                num_fruitless += 1
                await self._wait_or_give_up(what, fault_of(error), num_fruitless, deadline_s)

    async def _read(self, file: RemoteFile, offset: int, view: memoryview) -> None:
        step = self._settings.piece_bytes
        deadline_s = self._clock.now_s() + self._settings.read_deadline_s
        try:
            # However it ends, no task is left that writes into the caller's memory.
            async with asyncio.TaskGroup() as group:
                for start in range(0, len(view), step):
                    group.create_task(self._read_piece(file, offset + start, view[start : start + step], deadline_s))
        except BaseExceptionGroup as failed:
            raise _first(failed) from None

    async def _read_piece(self, file: RemoteFile, offset: int, view: memoryview, deadline_s: float) -> None:
        """From where the last request broke on, until all is here. Lets go of `view`, however it ends: a task that is
        done is still there for a moment, and the caller may want to unmap its memory by then."""
        with view:
            await self._read_on(file, offset, view, deadline_s)

    async def _read_on(self, file: RemoteFile, offset: int, view: memoryview, deadline_s: float) -> None:
        done = num_fruitless = 0
        while done < len(view):
            progress = _Progress()
            try:
                async with self._slots:
                    left_s = max(0.0, deadline_s - self._clock.now_s())
                    async with asyncio.timeout(min(left_s, self._settings.request_timeout_s)):
                        with view[done:] as rest:
                            await self._request(file, offset + done, rest, progress, careful=num_fruitless > 0)
                done += progress.num_bytes
            except (store_errors.BaseError, OSError, TimeoutError, Failed) as error:
                done += progress.num_bytes
                num_fruitless = 0 if progress.num_bytes else num_fruitless + 1
                fault = fault_of(error)
                if fault is Fault.NO_RANGES:
                    raise _NoRanges from None
                await self._wait_or_give_up(f"{file.name} at byte {offset + done}", fault, num_fruitless, deadline_s)

    async def _wait_or_give_up(self, what: str, fault: Fault, num_fruitless: int, deadline_s: float) -> None:
        left_s = deadline_s - self._clock.now_s()
        step = next_step(
            fault,
            num_fruitless=num_fruitless,
            left_s=left_s,
            chance=self._rng.random(),
            settings=self._settings.retry,
        )
        if step.retry_after_s is None:
            # The cause could hold a signed address.
            raise LoadError(f"{self.name}: {what}: {step.reason}", reason=fault.name.lower()) from None
        await self._clock.sleep(step.retry_after_s)

    async def _request(
        self, file: RemoteFile, offset: int, view: memoryview, progress: _Progress, *, careful: bool
    ) -> None:
        """`careful`: connections break before they bring much; every byte is taken as it comes."""
        options: GetOptions = {"range": (offset, offset + len(view)), **pin(file)}
        result = await self._answer(file, options)
        check_same(file, result)
        if tuple(result.range) != (offset, offset + len(view)):
            # The file ends before, or the server answers what it likes.
            raise Failed(Fault.WRONG_RANGE)
        await self._take(result, view, progress, min_bytes=1 if careful else STREAM_BYTES)

    async def _stream_whole(self, file: RemoteFile, view: memoryview) -> None:
        result = await self._answer(file, pin(file))
        check_same(file, result)
        await self._take(result, view, _Progress(), min_bytes=STREAM_BYTES)

    async def _answer(self, file: RemoteFile, options: GetOptions) -> GetResult:
        async with asyncio.timeout(self._settings.stall_timeout_s):
            return await obstore.get_async(self._store, file.name, options=options)

    async def _take(self, result: GetResult, view: memoryview, progress: _Progress, *, min_bytes: int) -> None:
        stream = result.stream(min_chunk_size=min_bytes)
        while True:
            try:
                async with asyncio.timeout(self._settings.stall_timeout_s):
                    piece = await anext(stream)
            except StopAsyncIteration:
                break
            end = progress.num_bytes + len(piece)
            if end > len(view):
                raise Failed(Fault.WRONG_RANGE)
            view[progress.num_bytes : end] = piece
            progress.num_bytes = end
        if progress.num_bytes < len(view):
            raise Failed(Fault.SHORT)


class ObjectSource:
    """`coldstart.source.ByteSource` over one file of an `ObjectFolder`, as it was when it was looked at."""

    def __init__(self, folder: ObjectFolder, file: RemoteFile) -> None:
        self._folder = folder
        self._file = file
        #: The file where its server knows no ranges.
        self._whole: bytes | None = None
        self._whole_lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{self._folder.name}/{self._file.name}"

    @property
    def num_bytes(self) -> int:
        return self._file.num_bytes

    def read_into(self, offset: int, into: Buffer) -> None:
        with memoryview(into) as whole, whole.cast("B") as view:
            self._read_into(offset, view)

    def _read_into(self, offset: int, view: memoryview) -> None:
        if offset < 0 or offset + len(view) > self.num_bytes:
            raise LoadError(f"{self.name}: has {self.num_bytes} bytes, not {offset} + {len(view)}")
        if not len(view):
            return
        if self._whole is None:
            try:
                self._folder.read_into(self._file, offset, view)
                return
            except _NoRanges:
                self._read_whole()
        assert self._whole is not None
        view[:] = self._whole[offset : offset + len(view)]

    def _read_whole(self) -> None:
        limit = self._folder.settings.whole_file_bytes
        if self.num_bytes > limit:
            raise LoadError(
                f"{self.name}: {Fault.NO_RANGES.value}, and {self.num_bytes} bytes are too many to read like that"
                f" (limit {limit}): the store must support range requests",
                reason="no_ranges",
            )
        with self._whole_lock:
            if self._whole is None:
                self._whole = self._folder.read_whole(self._file)

    def close(self) -> None:
        self._whole = None


@dataclass(slots=True)
class _Progress:
    num_bytes: int = 0


class _NoRanges(Exception):
    """The server answers a range with the whole file."""


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    for error in group.exceptions:
        return (
            _first(cast("BaseExceptionGroup[BaseException]", error)) if isinstance(error, BaseExceptionGroup) else error
        )
    raise AssertionError("a group has a member")
