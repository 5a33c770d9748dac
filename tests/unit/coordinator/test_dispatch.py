"""The dispatch policy: pure, so every case is a table of views and a verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import DispatchItem, Placement, Rejection, Role, WorkerInfo, WorkerLoad
from coordinator.policy import DispatchLimits, WorkerView, dispatch

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="float32")


def identity(fingerprint: str = "m") -> KvIdentity:
    return KvIdentity(model_fingerprint=fingerprint, layout=LAYOUT, rope_base=10000.0, protocol_version=1)


def view(
    name: str,
    role: Role,
    *,
    pending: int = 0,
    context: int = 0,
    waiting: int = 0,
    fingerprint: str = "m",
    blocks: int = 1000,
) -> WorkerView:
    info = WorkerInfo(
        worker_id=WorkerId(name),
        incarnation=Incarnation(1),
        role=role,
        address=f"{name}:1",
        model="m",
        identity=identity(fingerprint),
        total_blocks=blocks,
        max_context_tokens=min(8192, blocks * LAYOUT.block_tokens),
    )
    load = WorkerLoad(pending_prompt_tokens=pending, context_tokens=context, waiting_requests=waiting)
    return WorkerView(info=info, load=load)


def item(name: str = "r", tokens: int = 100, avoid: tuple[str, ...] = ()) -> DispatchItem:
    return DispatchItem(
        request_id=RequestId(name),
        prompt_tokens=tokens,
        max_tokens=16,
        avoid=tuple(WorkerId(worker) for worker in avoid),
    )


def place(ask: DispatchItem, *views: WorkerView) -> Placement | Rejection:
    return dispatch([ask], views, DispatchLimits())[0]


def test_least_loaded_of_each_role() -> None:
    verdict = place(
        item(),
        view("p0", "prefill", pending=500),
        view("p1", "prefill", pending=20),
        view("d0", "decode", context=10),
        view("d1", "decode", context=9),
    )
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == ("p1", "d1")
    assert "20 tokens pending of 2 workers" in verdict.reason


def test_ties_go_to_the_smaller_worker_id() -> None:
    verdict = place(item(), view("p1", "prefill"), view("p0", "prefill"), view("d1", "decode"), view("d0", "decode"))
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == ("p0", "d0")


def test_mixed_worker_keeps_its_prompt() -> None:
    verdict = place(item(), view("m0", "mixed"), view("d0", "decode"))
    assert isinstance(verdict, Placement)
    assert verdict.prefill == verdict.decode
    assert verdict.prefill.worker_id == "m0"


def test_no_prefill_worker() -> None:
    verdict = place(item(), view("d0", "decode"))
    assert isinstance(verdict, Rejection)
    assert verdict.code == "not_ready"
    assert verdict.message == "no prefill worker can take the request (workers up: d0 (decode))"


def test_no_compatible_decode_worker() -> None:
    verdict = place(item(), view("p0", "prefill"), view("d0", "decode", fingerprint="other"))
    assert isinstance(verdict, Rejection)
    assert "no decode worker" in verdict.message


def test_an_incompatible_pair_is_passed_over() -> None:
    verdict = place(
        item(),
        view("p0", "prefill", fingerprint="old"),
        view("p1", "prefill", pending=1000),
        view("d0", "decode"),
    )
    assert isinstance(verdict, Placement)
    assert verdict.prefill.worker_id == "p1"


def test_full_queues_say_how_full() -> None:
    verdict = place(item(), view("p0", "prefill", pending=7, waiting=512), view("d0", "decode"))
    assert isinstance(verdict, Rejection)
    assert verdict.code == "no_capacity"
    assert "p0, has 512 requests and 7 prompt tokens waiting" in verdict.message


@pytest.mark.parametrize(
    ("views", "avoid", "chosen"),
    [
        ("p0 d0 d1", ("d0",), ("p0", "d1")),
        ("p0 p1 d0", ("p0",), ("p1", "d0")),
        ("p0 p1 d0 d1", ("p0", "d0"), ("p1", "d1")),
        ("m0 m1", ("m0",), ("m1", "m1")),
        ("m0 p0 d0", ("m0",), ("p0", "d0")),
        ("m0 p0 d0", ("d0",), ("m0", "m0")),
        ("m0 p0 d0", ("p0", "m0"), ("p0", "d0")),
        # Nobody else: the failure may be over, or a new life may have the name.
        ("p0 d0", ("d0",), ("p0", "d0")),
        ("p0 d0", ("p0", "d0"), ("p0", "d0")),
        ("m0", ("m0",), ("m0", "m0")),
        ("p0 d0 d1", ("d0", "d1"), ("p0", "d0")),
        # Names of workers that are gone mean nothing.
        ("p0 d0", ("p7",), ("p0", "d0")),
    ],
)
def test_workers_to_avoid_come_last(views: str, avoid: tuple[str, ...], chosen: tuple[str, str]) -> None:
    """The avoided ones are the idle ones here."""
    roles: dict[str, Role] = {"p": "prefill", "d": "decode", "m": "mixed"}
    verdict = place(
        item(avoid=avoid),
        *(
            view(name, roles[name[0]], pending=0 if name in avoid else 99, context=0 if name in avoid else 99)
            for name in views.split()
        ),
    )
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == chosen
    assert ("to be avoided" in verdict.reason) == bool(set(chosen) & set(avoid))


def test_a_full_worker_is_no_alternative_to_an_avoided_one() -> None:
    verdict = place(
        item(avoid=("p0",)), view("p0", "prefill"), view("p1", "prefill", waiting=512), view("d0", "decode")
    )
    assert isinstance(verdict, Placement)
    assert verdict.prefill.worker_id == "p0"


def test_a_reader_whose_writer_is_avoided_comes_after_one_whose_is_not() -> None:
    views = (
        view("p0", "prefill", fingerprint="a"),
        view("p1", "prefill", fingerprint="b", pending=9),
        view("d0", "decode", fingerprint="a"),
        view("d1", "decode", fingerprint="b"),
    )
    verdict = place(item(avoid=("d0",)), *views)
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == ("p1", "d1")


def test_a_prompt_goes_where_it_fits() -> None:
    views = (view("p0", "prefill"), view("d0", "decode", blocks=4), view("d1", "decode", context=999))
    verdict = place(item(tokens=100), *views)
    assert isinstance(verdict, Placement)
    assert verdict.decode.worker_id == "d1", "d0 is idle and too small"


def test_a_worker_for_the_whole_answer_comes_first() -> None:
    views = (view("p0", "prefill"), view("d0", "decode", blocks=7), view("d1", "decode", context=999))
    verdict = place(item(tokens=100), *views)
    assert isinstance(verdict, Placement)
    assert verdict.decode.worker_id == "d1", "d0 holds 112 tokens, prompt and answer are 116"


def test_what_fits_nowhere_is_not_worth_repeating() -> None:
    verdict = place(item(tokens=200), view("p0", "prefill", blocks=4), view("d0", "decode", blocks=8))
    assert isinstance(verdict, Rejection)
    assert verdict.code == "context_length_exceeded"
    assert verdict.message.endswith("fit into no worker; the largest holds 128 tokens")


def test_a_burst_in_one_call_is_spread() -> None:
    views = [view("p0", "prefill"), view("p1", "prefill"), view("d0", "decode"), view("d1", "decode")]
    verdicts = dispatch([item(f"r{n}") for n in range(10)], views, DispatchLimits())
    chosen = [verdict.prefill.worker_id for verdict in verdicts if isinstance(verdict, Placement)]
    assert chosen.count(WorkerId("p0")) == chosen.count(WorkerId("p1")) == 5


@given(
    pendings=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    contexts=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    tokens=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
)
def test_each_choice_is_a_least_loaded_one(pendings: list[int], contexts: list[int], tokens: list[int]) -> None:
    views = [view(f"p{n}", "prefill", pending=load) for n, load in enumerate(pendings)]
    views += [view(f"d{n}", "decode", context=load) for n, load in enumerate(contexts)]
    items = [item(f"r{n}", count) for n, count in enumerate(tokens)]
    prefill = {f"p{n}": load for n, load in enumerate(pendings)}
    decode = {f"d{n}": load for n, load in enumerate(contexts)}
    for ask, verdict in zip(items, dispatch(items, views, DispatchLimits()), strict=True):
        assert isinstance(verdict, Placement)
        assert prefill[verdict.prefill.worker_id] == min(prefill.values())
        assert decode[verdict.decode.worker_id] == min(decode.values())
        prefill[verdict.prefill.worker_id] += ask.prompt_tokens
        decode[verdict.decode.worker_id] += ask.prompt_tokens + ask.max_tokens
