"""What admission makes of too much load, for `benchmarks.policies`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.policies_refusals import verdicts
from benchmarks.policies_runner import FORMS, JUDGING_FORMS, TPOT_TARGET_S, job_at
from benchmarks.report import print_table

if TYPE_CHECKING:
    from benchmarks.policies_refusals import Verdict
    from benchmarks.policies_runner import Runner
    from benchmarks.policies_runs import Job, Load, Ran
    from contracts.config import AdmissionForm, DispatchPolicyName

#: Of a run under overload.
Key = tuple["DispatchPolicyName", "AdmissionForm", float]


def overload_jobs(at_capacity: Load) -> dict[Key, Job]:
    policies: tuple[DispatchPolicyName, ...] = ("least_loaded", "ttft_min")
    return {
        (policy, form, factor): job_at(at_capacity, factor, policy, form)
        for factor in (1.2, 1.5)
        for policy in policies
        for form in FORMS
    }


def overload(runner: Runner, at_capacity: Load, num_let_in: dict[AdmissionForm, int]) -> dict[str, float]:
    jobs = overload_jobs(at_capacity)
    ran = dict(zip(jobs, runner.all(jobs.values()), strict=True))
    judged: dict[AdmissionForm, Ran] = {form: ran["ttft_min", form, 1.5] for form in JUDGING_FORMS}
    trying = {form: runner.let_in(judged[form], num_let_in[form]) for form in JUDGING_FORMS}
    print_table(
        "admission under overload; targets of 30 s and 200 ms",
        ["policy", "admission", "load", "accepted", "met of all", "missed of accepted", "refused for", "events/s"],
        [
            [
                policy,
                form,
                factor,
                each.num_accepted / each.num_requests,
                each.attained[TPOT_TARGET_S],
                each.accepted_missing,
                ", ".join(f"{name} {count}" for name, count in each.num_rejected_for.items()) or "-",
                each.events_per_s,
            ]
            for (policy, form, factor), each in ran.items()
        ],
    )
    figures = _over_least_loaded(ran)
    found: dict[AdmissionForm, list[Verdict]] = {
        form: verdicts(judged[form], [each for part in trying[form] for each in part.result()])
        for form in JUDGING_FORMS
    }
    _print_verdicts(found)
    for form in JUDGING_FORMS:
        suffix = "" if form == "predicted" else f"_{form}"
        share, (low, high) = (found[form][0].of_offered, found[form][0].interval) if found[form] else (0.0, (0.0, 0.0))
        figures[f"false_reject_rate{suffix}"] = share
        figures[f"false_reject_rate_low{suffix}"] = low
        figures[f"false_reject_rate_high{suffix}"] = high
        figures[f"accepted_missing_slo{suffix}"] = judged[form].accepted_missing
    return figures | {f"in_slo_{form}": ran["ttft_min", form, 1.5].attained[TPOT_TARGET_S] for form in FORMS}


def _over_least_loaded(ran: dict[Key, Ran]) -> dict[str, float]:
    """Requests within both targets, `ttft_min` over `least_loaded`: the policies alone, both with admission, and all
    that this system does over what most do."""
    compared: dict[str, tuple[AdmissionForm, AdmissionForm]] = {
        "in_slo_over_least_loaded": ("none", "none"),
        "in_slo_over_least_loaded_both_admitting": ("predicted", "predicted"),
        "in_slo_admitting_over_least_loaded_alone": ("predicted", "none"),
    }
    ratios = {
        (name, factor): ran["ttft_min", ours, factor].attained[TPOT_TARGET_S]
        / max(1e-9, ran["least_loaded", theirs, factor].attained[TPOT_TARGET_S])
        for name, (ours, theirs) in compared.items()
        for factor in (1.2, 1.5)
    }
    print_table(
        "requests within both targets: ttft_min over least_loaded",
        ["admission of ttft_min / of least_loaded", "at 120 %", "at 150 %"],
        [[f"{ours} / {theirs}", ratios[name, 1.2], ratios[name, 1.5]] for name, (ours, theirs) in compared.items()],
    )
    return {name: ratios[name, 1.2] for name in compared}


def _print_verdicts(found: dict[AdmissionForm, list[Verdict]]) -> None:
    print_table(
        "were the refusals at 150 % right? A sample of them, each let in alone; 95 % intervals. The last columns: what "
        "the coordinator expected less what came, median",
        ["admission", "refused for", "requests", "tried", "met", "% of offered", "interval", "TTFT s", "TPOT ms"],
        [
            [
                form,
                each.reason,
                each.num_refused,
                each.num_tried,
                each.num_met,
                f"{100 * each.of_offered:.2f}",
                " - ".join(f"{100 * bound:.2f}" for bound in each.interval),
                each.ttft_error_s,
                each.tpot_error_s * 1e3,
            ]
            for form, verdicts_of in found.items()
            for each in verdicts_of
        ],
    )
