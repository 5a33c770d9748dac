"""How long answers take, as the forecasts reckon: means over all workers and over what was placed lately."""

from __future__ import annotations

from coordinator.policy.outlook import Pace

#: What a token of an answer takes before anything is known of steps.
_UNKNOWN_TOKEN_S = 0.05
#: How much the last counts: of the reports, of the placements.
_NEWEST_SHARE = 0.05
#: Seconds in a seat, as the model has them, that what is measured must outweigh.
_TRUST_S = 0.5
#: A worker that is slower than this by the model has stopped, and is not what others will be like.
_MOST_SLOWNESS = 10.0


class PaceKeeper:
    """Keeps `pace`. What steps cost is known of workers that have nothing else to do; beside others on a busy machine,
    and with what comes between steps and between two answers, they take longer. Where all seats are taken it shows in
    how many tokens come out of them."""

    def __init__(self, mean_tokens: float) -> None:
        """`mean_tokens` of an answer, as `note_lengths` takes it."""
        self.pace = Pace(answer_tokens=mean_tokens, token_s=_UNKNOWN_TOKEN_S)
        self._mean_tokens = mean_tokens
        self._step_s = _UNKNOWN_TOKEN_S
        self._num_steps = 0
        self._num_placed = 0
        #: Mean of what placements allow their answers.
        self._allowed_tokens = 0.0
        #: Seconds in seats, fading: as measured, and as steps cost.
        self._measured_s = 0.0
        self._modelled_s = 0.0

    def note_lengths(self, mean_tokens: float) -> None:
        """Mean tokens of answers that have ended."""
        self._mean_tokens = mean_tokens
        self._look_at_lengths()

    def note_placed(self, prompt_tokens: int, max_tokens: int) -> None:
        self._num_placed += 1
        share = max(_NEWEST_SHARE, 1.0 / self._num_placed)
        self.pace.prompt_tokens += share * (prompt_tokens - self.pace.prompt_tokens)
        self._allowed_tokens += share * (max_tokens - self._allowed_tokens)
        self._look_at_lengths()

    def note_step(self, step_s: float, seats_s: float = 0.0, num_tokens: int = 0) -> None:
        """A worker's present steps cost `step_s` seconds. Where its seats have all been taken since its last report:
        the seconds of all of them, and the tokens of the answers that ended."""
        self._num_steps += 1
        share = max(_NEWEST_SHARE, 1.0 / self._num_steps)
        step_s = max(step_s, 1e-9)
        self._step_s += share * (step_s - self._step_s)
        self._measured_s += seats_s - _NEWEST_SHARE * self._measured_s
        self._modelled_s += num_tokens * step_s - _NEWEST_SHARE * self._modelled_s
        slowness = (self._measured_s + _TRUST_S) / (self._modelled_s + _TRUST_S)
        self.pace.token_s = self._step_s * min(max(slowness, 1.0), _MOST_SLOWNESS)

    def _look_at_lengths(self) -> None:
        """Before many have ended little but what they are allowed is known of answers."""
        tokens = self._mean_tokens
        self.pace.answer_tokens = max(1.0, min(tokens, self._allowed_tokens)) if self._num_placed else tokens
