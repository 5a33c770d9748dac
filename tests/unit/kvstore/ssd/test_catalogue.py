"""The catalogue agrees with a dict, and its sums with what they are sums of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.ssd.catalogue import Catalogue, Segment
from kvstore.ssd.format import new_rows, set_keys
from tests.support.ssd_tiers import key

NUMBERS = st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True)
ACTIONS = st.one_of(
    st.tuples(st.just("record"), NUMBERS),
    st.tuples(st.just("remove"), NUMBERS),
    st.tuples(st.just("touch"), NUMBERS),
    st.tuples(st.just("pin"), NUMBERS),
    st.tuples(st.just("unpin"), NUMBERS),
    st.tuples(st.just("segment"), NUMBERS),
    st.tuples(st.just("give up"), NUMBERS),
)
HALF_LIFE_BYTES = 100


@given(st.lists(ACTIONS, max_size=40), st.floats(0.0, 4000.0))
def test_it_agrees_with_a_dict(actions: list[tuple[str, list[int]]], step_s: float) -> None:
    catalogue = Catalogue(64, b"i" * 16, half_life_bytes=HALF_LIFE_BYTES, now_s=100.0)
    segments: list[Segment] = [catalogue.open_segment(1, 2**20)]
    #: (segment, offset), times of uses, pinned.
    model: dict[bytes, tuple[Segment, int, list[float], bool]] = {}
    now_s, offset = 100.0, 4096
    for what, numbers in actions:
        now_s += step_s
        keys = [key(number) for number in numbers]
        if what == "record":
            rows = new_rows(len(keys))
            set_keys(rows, keys)
            rows["start"] = [64 * place for place in range(len(keys))]
            rows["length"] = [10 + number for number in numbers]
            catalogue.record(segments[-1], offset, rows, now_s)
            for place, each in enumerate(keys):
                _, _, uses, pinned = model.get(each, (None, 0, [now_s], False))
                model[each] = (segments[-1], offset + 64 * place, uses, pinned)
            offset += 4096
        elif what == "remove":
            assert sorted(catalogue.remove(keys)) == sorted(each for each in keys if model.pop(each, None))
        elif what == "touch":
            catalogue.touch(keys, now_s)
            for each in set(keys) & set(model):
                model[each][2].append(now_s)
        elif what in ("pin", "unpin"):
            catalogue.pin(keys, pinned=what == "pin")
            for each in set(keys) & set(model):
                model[each] = (*model[each][:3], what == "pin")
        elif what == "segment":
            segments.append(catalogue.open_segment(segments[-1].sequence + 1, 2**20))
        elif len(segments) > 1:
            segment = segments.pop(0)
            gone = catalogue.remove([location.key for location in catalogue.blocks_of(segment)])
            assert sorted(gone) == sorted(each for each, (where, *_) in model.items() if where is segment)
            catalogue.close_segment(segment)
            model = {each: value for each, value in model.items() if value[0] is not segment}
    everything = [key(number) for number in range(21)]
    assert sorted(catalogue.keys()) == sorted(model)
    assert catalogue.num_blocks == len(model)
    assert catalogue.num_pinned == sum(pinned for *_, pinned in model.values())
    assert catalogue.is_pinned(everything).tolist() == [each in model and model[each][3] for each in everything]
    for each, location in zip(everything, catalogue.locate(everything), strict=True):
        assert (location is not None) == (each in model)
        if location is not None:
            assert (location.segment, location.offset) == model[each][:2]
            assert catalogue.stands_at(location)
    for segment in segments:
        here = {each: value for each, value in model.items() if value[0] is segment}
        lengths = {each: 10 + everything.index(each) for each in here}
        assert {location.key for location in catalogue.blocks_of(segment)} == set(here)
        assert segment.num_live == len(here)
        assert segment.live_bytes == sum(lengths.values())
        assert segment.pinned_bytes == sum(lengths[each] for each, (*_, pinned) in here.items() if pinned)


def store(catalogue: Catalogue, segment: Segment, number: int, num_bytes: int) -> None:
    rows = new_rows(1)
    set_keys(rows, [key(number)])
    rows["length"] = num_bytes
    catalogue.record(segment, 0, rows, 0.0)


def test_use_counts_for_more_than_age_and_recent_use_for_more_than_old() -> None:
    catalogue = Catalogue(64, b"i" * 16, half_life_bytes=HALF_LIFE_BYTES, now_s=0.0)
    segments = [catalogue.open_segment(number, 2**20) for number in range(4)]
    for number in range(3):
        store(catalogue, segments[number], number, 1)
    catalogue.touch([key(0)], 0.0)
    store(catalogue, segments[3], 3, HALF_LIFE_BYTES)
    catalogue.touch([key(1)], 0.0)
    worths = catalogue.segment_columns(segments).worth
    assert worths[1] > worths[0] > worths[2] > 0
    assert worths[0] < 2 * worths[3], "two uses, but a half-life ago"
    # A thousand half-lives later the sums have neither overflowed nor forgotten what is recent.
    store(catalogue, segments[3], 4, 1000 * HALF_LIFE_BYTES)
    catalogue.touch([key(2)], 0.0)
    worths = catalogue.segment_columns(segments).worth
    assert worths[2] > worths[1] >= 0


def test_a_block_that_moves_keeps_what_is_known_of_it() -> None:
    catalogue = Catalogue(64, b"i" * 16, half_life_bytes=HALF_LIFE_BYTES, now_s=0.0)
    old, new = catalogue.open_segment(1, 2**20), catalogue.open_segment(2, 2**20)
    rows = new_rows(1)
    set_keys(rows, [key(0)])
    rows["length"] = 10
    catalogue.record(old, 0, rows, 0.0)
    catalogue.touch([key(0)], 5.0)
    catalogue.pin([key(0)], pinned=True)
    catalogue.record(new, 64, rows, 7.0)
    (known,) = catalogue.describe([key(0)], 8.0)
    assert known is not None
    assert (known.hits, known.age_s, known.idle_s, known.is_pinned) == (1, 8.0, 3.0, True)
    assert (old.num_live, old.pinned_bytes, new.num_live, new.pinned_bytes) == (0, 0, 1, 10)
