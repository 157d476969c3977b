"""The labelled zoo: every run by name, sick, cured and healthy, and how each is judged."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gradflow.records import Finding
from gradflow.rules import diagnose
from gradflow.store import Run
from zoo.case import Case
from zoo.healthy import HEALTHY as FIRST_HEALTHY
from zoo.held import HELD_HEALTHY, HELD_SICK
from zoo.outside import OUTSIDE_HEALTHY, OUTSIDE_SICK
from zoo.peers import PEERS
from zoo.sick_flow import BRANCHES, DEPTH
from zoo.sick_training import ACTIVATIONS, NUMBERS, OPTIMIZER
from zoo.stranger import STRANGER_HEALTHY, STRANGER_SICK
from zoo.training import Setup, train

SICK: dict[str, Case] = {**DEPTH, **BRANCHES, **NUMBERS, **ACTIVATIONS, **OPTIMIZER, **OUTSIDE_SICK, **HELD_SICK, **STRANGER_SICK}
HEALTHY: dict[str, Setup] = {**FIRST_HEALTHY, **OUTSIDE_HEALTHY, **HELD_HEALTHY, **STRANGER_HEALTHY}


@dataclass(frozen=True)
class Draw:
    """Seed and cadence other than the ones that a run was labelled with; None keeps those."""

    seed: int | None = None
    every: int | None = None

    def train(self, name, setup, proof=None):
        changes = {key: value for key, value in vars(self).items() if value is not None}
        folder = "".join(f"{key}-{value}/" for key, value in changes.items())
        return train(folder + name, setup.but(**changes), proof)


LABELLED = Draw()


@dataclass
class Judged:
    """One run of the zoo against its label.

    Attributes:
        name: Of the run.
        code: Its label, empty for a healthy run.
        found: Whether the label was found at the severity it has to have.
        placed: Whether one of the finding's first three places is the right one.
        dated: Whether it begins within two sampled intervals of when the sickness did.
        proved: Whether plain PyTorch proves the label; `figure` is what it measured.
        false: Warnings and errors that are neither the label nor known to be true beside it.
        remedied: Whether the finding's first remedy is the one that the cure applies; None where there is no cure.
        cured: Whether, with it, the finding is gone and the held-out loss is lower; None where there is none.
        losses: Held-out loss at the end, sick and cured.
        peers: Codes that each fixed-threshold tool would report.
        run: What was recorded, and `twin` the same of the cured twin or of the healthy run that stands in for one.
        findings: Everything that was found.
        cure_findings: Alarms of the cured twin.
    """

    name: str
    code: str = ""
    found: bool = False
    placed: bool = False
    dated: bool = False
    proved: bool = True
    figure: float = 0.0
    false: list[str] = field(default_factory=list)
    remedied: bool | None = None
    cured: bool | None = None
    losses: tuple[float, ...] = ()
    peers: dict[str, set[str]] = field(default_factory=dict)
    run: Run | None = field(default=None, repr=False)
    twin: Run | None = field(default=None, repr=False)
    findings: list[Finding] = field(default_factory=list)
    cure_findings: list[Finding] = field(default_factory=list)


def alarms(findings):
    return [finding for finding in findings if finding.severity != "info"]


def judge_healthy(name, draw=LABELLED):
    run, result = draw.train(f"healthy/{name}", HEALTHY[name])
    findings = diagnose(run)
    return Judged(
        name, false=[f.code for f in alarms(findings)], findings=findings, losses=(result["before"], result["after"]),
        peers={peer: rules(run) for peer, rules in PEERS.items()},
    )  # fmt: skip


def judge_sick(name, draw=LABELLED):
    case = SICK[name]
    run, result = draw.train(f"sick/{name}", case.setup, case.proof)
    findings = diagnose(run)
    wanted = findings if case.code == "massive-activation" else alarms(findings)
    hits = [finding for finding in wanted if finding.code == case.code]
    slack = 2 * case.setup.every
    judged = Judged(
        name, case.code, found=bool(hits),
        placed=any(re.search(case.place, place) for hit in hits for place in hit.where[:3]),
        dated=any(case.since - slack <= hit.steps[0] <= case.since + slack for hit in hits),
        proved=result["holds"], figure=result["proof"],
        false=[f.code for f in alarms(findings) if f.code != case.code and f.code not in case.also],
        run=run, findings=findings, losses=(result["after"],), peers={peer: rules(run) for peer, rules in PEERS.items()},
    )  # fmt: skip
    if case.cure is not None:
        _cure(judged, case, hits, draw)
    elif case.twin:
        judged.twin, _ = draw.train(f"healthy/{case.twin}", HEALTHY[case.twin])
    return judged


def _cure(judged, case, hits, draw):
    remedy = hits[0].remedy if hits else ""
    judged.remedied = bool(re.search(case.remedy, remedy, re.DOTALL))
    if callable(case.cure) and not judged.remedied:
        judged.cured = False
        return
    change = case.cure(remedy) if callable(case.cure) else case.cure
    said = "".join(f"-{value}" for value in change.values() if isinstance(value, float))
    run, result = draw.train(f"cured/{judged.name}{said}", case.setup.but(**change))
    judged.twin, judged.cure_findings = run, alarms(diagnose(run))
    judged.losses = (*judged.losses, result["after"])
    gone = case.code not in {finding.code for finding in judged.cure_findings}
    judged.cured = judged.remedied and gone and judged.losses[1] < judged.losses[0]
