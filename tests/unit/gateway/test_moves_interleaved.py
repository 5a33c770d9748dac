"""Any interleaving of moves, losses and messages: one owner for each epoch, and the whole answer, each token once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import event, given
from hypothesis import strategies as st

from contracts.requests import Claim
from gateway import events as ev
from gateway.limits import GatewayLimits
from tests.unit.gateway.test_moves import DECODE3, FAILED, claim, machine
from tests.unit.gateway.test_ownership import DECODE, DECODE2, PREFILL, delta, placement

if TYPE_CHECKING:
    from contracts.messages import ClaimVerdict, Peer, RequestKey
    from contracts.requests import FinishReason, TokenDelta
    from gateway.ownership import RequestMachine

NUM_TOKENS = 8
WORKERS = (DECODE, DECODE2, DECODE3)


@dataclass
class Owned:
    """A worker's ownership of the request: writes until it yields or is told to stop."""

    epoch: int
    attempt: int
    #: Index of the next token.
    next_index: int
    #: It does not write: its move is on its way.
    is_paused: bool = False


@dataclass
class World:
    """Workers that write, move and lose one request, and a network that keeps what each says in order and nothing
    else. A worker does what `contracts.requests.Claim` lets it do, and no more."""

    data: st.DataObject
    request: RequestMachine
    #: What each worker has said and the gateway has not heard.
    wires: dict[Peer, list[ev.Event]] = field(default_factory=lambda: {peer: [] for peer in (PREFILL, *WORKERS)})
    #: Verdicts on their way.
    told: list[ev.SendVerdict] = field(default_factory=list["ev.SendVerdict"])
    owned: dict[Peer, Owned] = field(default_factory=dict["Peer", Owned])
    claims: dict[Peer, Claim] = field(default_factory=dict["Peer", Claim])
    seen: list[int] = field(default_factory=list[int])
    grants: dict[tuple[int, int], set[Peer]] = field(default_factory=dict["tuple[int, int]", "set[Peer]"])
    ends: list[ev.End] = field(default_factory=list["ev.End"])

    def say(self, peer: Peer, part: TokenDelta) -> None:
        self.wires[peer].append(ev.Received(peer, part))

    def hear(self, happens: ev.Event) -> None:
        for each in self.request.handle(happens, 1.0):
            match each:
                case ev.Deliver(part):
                    assert not self.ends
                    self.seen += part.token_ids
                case ev.End():
                    self.ends.append(each)
                case ev.SendVerdict(peer, verdict):
                    if verdict.granted:
                        self.grants.setdefault((verdict.key.attempt, verdict.key.owner_epoch), set()).add(peer)
                    self.told.append(each)
                case ev.SendCancel(peers, cancelled):
                    for peer in peers:
                        # Or it is lost.
                        if self.data.draw(st.booleans()):
                            self.forget(peer, cancelled)
                case ev.AnswerStray(peer, cancelled):
                    self.forget(peer, cancelled)
                case ev.AskPlacement():
                    decode = self.data.draw(st.sampled_from(WORKERS))
                    self.hear_placed(decode)
                case _:
                    pass
        assert self.seen == list(range(len(self.seen)))

    def hear_placed(self, decode: Peer) -> None:
        """A try that reads the prompt and hands it on at once."""
        self.hear(ev.Placed(placement(PREFILL, decode)))
        attempt, epoch = self.request.key.attempt, self.request.key.owner_epoch
        self.hear(ev.StreamsOpened(attempt))
        start = len(self.seen)
        self.say(PREFILL, self.part(Owned(epoch, attempt, start)))
        if start + 1 < NUM_TOKENS:
            self.owned[decode] = Owned(epoch, attempt, start + 1)
        self.claims.pop(decode, None)
        self.hear(ev.PrefillAccepted(attempt))

    def part(self, owned: Owned) -> TokenDelta:
        index = owned.next_index
        finish: FinishReason | None = "length" if index == NUM_TOKENS - 1 else None
        return delta(index, index, attempt=owned.attempt, owner_epoch=owned.epoch, finish=finish)

    def forget(self, peer: Peer, cancelled: RequestKey) -> None:
        owned, made = self.owned.get(peer), self.claims.get(peer)
        if owned is not None and (owned.attempt, owned.epoch) == (cancelled.attempt, cancelled.owner_epoch):
            del self.owned[peer]
        if made is not None and (made.attempt, made.owner_epoch) == (cancelled.attempt, cancelled.owner_epoch):
            del self.claims[peer]

    # What may happen next. Each returns whether it could.

    def write(self) -> bool:
        able = [peer for peer, owned in self.owned.items() if not owned.is_paused]
        if not able:
            return False
        peer = self.data.draw(st.sampled_from(able))
        owned = self.owned[peer]
        self.say(peer, self.part(owned))
        owned.next_index += 1
        if owned.next_index == NUM_TOKENS:
            del self.owned[peer]
        return True

    def move(self) -> bool:
        """A worker yields; another one claims, and says so as often as it likes."""
        able = [peer for peer, owned in self.owned.items() if not owned.is_paused]
        free = [peer for peer in WORKERS if peer not in self.owned and peer not in self.claims]
        if not able or not free:
            return False
        source, destination = self.data.draw(st.sampled_from(able)), self.data.draw(st.sampled_from(free))
        self.owned[source].is_paused = True
        self.claims[destination] = self.claim_of(self.owned[source])
        return self.repeat(destination)

    def claim_back(self) -> bool:
        able = [peer for peer, owned in self.owned.items() if owned.is_paused and peer not in self.claims]
        if not able:
            return False
        peer = self.data.draw(st.sampled_from(able))
        self.claims[peer] = self.claim_of(self.owned[peer])
        return self.repeat(peer)

    def claim_of(self, owned: Owned) -> Claim:
        return claim(owned.next_index, owned.epoch + 1, owned.attempt)

    def repeat(self, peer: Peer | None = None) -> bool:
        if not self.claims:
            return False
        peer = self.data.draw(st.sampled_from(list(self.claims))) if peer is None else peer
        self.wires[peer].append(ev.Claimed(peer, self.claims[peer]))
        return True

    def arrive(self) -> bool:
        """What was said, in order; or a verdict, maybe not."""
        able = [peer for peer, wire in self.wires.items() if wire]
        if able and (not self.told or self.data.draw(st.booleans())):
            self.hear(self.wires[self.data.draw(st.sampled_from(able))].pop(0))
            return True
        if not self.told:
            return False
        answer = self.told.pop(self.data.draw(st.integers(0, len(self.told) - 1)))
        if self.data.draw(st.integers(0, 3)):
            self.take(answer.peer, answer.verdict)
        return True

    def take(self, peer: Peer, verdict: ClaimVerdict) -> None:
        made = self.claims.get(peer)
        if made is None or (made.attempt, made.owner_epoch) != (verdict.key.attempt, verdict.key.owner_epoch):
            return
        del self.claims[peer]
        if verdict.granted:
            start = min(made.num_outputs, verdict.next_index)
            self.owned[peer] = Owned(made.owner_epoch, made.attempt, start)
        else:
            self.owned.pop(peer, None)

    def lose(self) -> bool:
        """A worker dies with all that it has said and has not been heard, and another one takes its place."""
        peer = self.data.draw(st.sampled_from((PREFILL, *WORKERS)))
        self.wires[peer].clear()
        self.owned.pop(peer, None)
        self.claims.pop(peer, None)
        self.told = [each for each in self.told if each.peer != peer]
        self.hear(ev.WorkerLost(peer, "killed"))
        return True

    def fail(self) -> bool:
        """A worker gives up what it has, or claims, and says so."""
        able = [peer for peer in WORKERS if peer in self.owned or peer in self.claims]
        if not able:
            return False
        peer = self.data.draw(st.sampled_from(able))
        owned, made = self.owned.pop(peer, None), self.claims.pop(peer, None)
        if made is not None:
            self.say_failed(peer, made.num_outputs, made.attempt, made.owner_epoch)
        elif owned is not None:
            self.say_failed(peer, owned.next_index, owned.attempt, owned.epoch)
        return True

    def say_failed(self, peer: Peer, index: int, attempt: int, owner_epoch: int) -> None:
        self.say(peer, delta(index, finish="error", attempt=attempt, owner_epoch=owner_epoch, error=FAILED))

    def wait_in_vain(self) -> bool:
        self.hear(ev.GapExpired())
        return True

    def drain(self) -> None:
        """Everything that was said is heard, and the claims that were made are repeated until they are answered."""
        for _ in range(300):
            if self.ends and not any((*self.wires.values(), self.told, self.claims)):
                return
            for wire in self.wires.values():
                while wire:
                    self.hear(wire.pop(0))
            for answer in [self.told.pop(0) for _ in range(len(self.told))]:
                self.take(answer.peer, answer.verdict)
            paused = [peer for peer, owned in self.owned.items() if owned.is_paused]
            for peer in paused:
                # The source waits no longer for what became of its move.
                self.claims.setdefault(peer, self.claim_of(self.owned[peer]))
            for peer in list(self.claims):
                self.hear(ev.Claimed(peer, self.claims[peer]))
            for peer, owned in list(self.owned.items()):
                if not owned.is_paused:
                    self.say(peer, self.part(owned))
                    owned.next_index += 1
                    if owned.next_index == NUM_TOKENS:
                        del self.owned[peer]
            if not self.ends and not any((*self.wires.values(), self.told)):
                self.hear(ev.GapExpired())
        raise AssertionError(f"it never ends: {self}")


@given(st.data())
def test_any_interleaving_leaves_one_owner_and_the_whole_answer(data: st.DataObject) -> None:
    world = World(data, machine(GatewayLimits(max_replays=1_000_000, replay_patience_s=1e9)))
    world.hear_placed(DECODE)
    steps = ["write", "write", "move", "move", "arrive", "arrive", "arrive", "repeat", "claim_back", "lose"]
    steps += ["wait_in_vain", "fail"]
    for _ in range(data.draw(st.integers(0, 40))):
        getattr(world, data.draw(st.sampled_from(steps)))()
        assert all(len(peers) == 1 for peers in world.grants.values()), f"two have one epoch: {world.grants}"
    world.drain()
    assert len(world.ends) == 1
    assert world.seen == list(range(NUM_TOKENS))
    assert not world.claims, "every claim is answered"
    timeline = world.ends[0].timeline
    event(f"moves {min(timeline.num_moves, 3)}")
    event(f"replays {min(timeline.num_replays, 3)}")
