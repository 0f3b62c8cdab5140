"""A study: trainings that differ in one thing, repeated over seeds, and what their figures say together.

A module each: the claims of the three papers (margins, coarse to fine, magnet), Omniglot by its protocols, heads on
frozen features, parity, and reproduce, which puts them together.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics import mean_and_student_interval
from ..reports import Picture, Section, Table, figure_text
from ..runs import Run
from ..terminal import UserError
from ..trials import Job, Trial


class Grouped:
    """Figures of runs, in groups of those that differ in nothing but their seed.

    Args:
        runs: group, seed and figures of each; `<figure>_interval` is half of a figure's 95% interval over episodes or
            queries.
    """

    def __init__(self, runs: Iterable[tuple[str, int, Mapping[str, float | None]]]) -> None:
        self._figures: dict[str, dict[int, Mapping[str, float | None]]] = {}
        for group, seed, figures in runs:
            self._figures.setdefault(group, {})[seed] = figures

    @property
    def groups(self) -> list[str]:
        """In the order in which their first runs came."""
        return list(self._figures)

    def values(self, group: str, figure: str) -> dict[int, float]:
        """A figure of every seed, in ascending order; NaN of a run that has it not."""
        found = {seed: figures.get(figure) for seed, figures in sorted(self._figures[group].items())}
        return {seed: math.nan if value is None else value for seed, value in found.items()}

    def mean(self, group: str, figure: str) -> tuple[float, float | None]:
        """Mean over seeds and half its 95% interval (Student's t); of one seed that over its episodes or queries."""
        values = list(self.values(group, figure).values())
        if len(values) > 1:
            return mean_and_student_interval(values)
        (figures,) = self._figures[group].values()
        return values[0], figures.get(f"{figure}_interval", figures.get(f"{figure}_student"))

    def differences(self, group: str, other: str, figure: str) -> list[float]:
        """group - other for each of the seeds that both have."""
        a, b = self.values(group, figure), self.values(other, figure)
        return [a[seed] - b[seed] for seed in a if seed in b]

    def difference(self, group: str, other: str, figure: str) -> tuple[float, float | None]:
        """Mean of the differences and half its 95% interval; one seed has none."""
        mean, interval = mean_and_student_interval(self.differences(group, other, figure))
        return mean, interval if self.num_seeds(group, other) > 1 else None

    def texts(self, group: str, figures: Iterable[str], minus: str | None = None) -> list[str]:
        """The means of a group for a table, or what they are above those of another group on the same seeds."""
        if minus is None:
            return [figure_text(figure, *self.mean(group, figure)) for figure in figures]
        return [figure_text(figure, *self.difference(group, minus, figure), signed=True) for figure in figures]

    def num_seeds(self, *groups: str) -> int:
        """Seeds that all of these groups have."""
        return len(set.intersection(*(set(self._figures[group]) for group in groups)))


class Results(Grouped):
    """The stored results of a study's trials, by group and seed."""

    def __init__(self, folder: Path, trials: Sequence[Trial]) -> None:
        self.folder, self.trials = folder, trials
        self.stored = {trial: Run(folder / trial.name).result() for trial in trials}
        super().__init__((trial.group, trial.config.seed, stored["figures"]) for trial, stored in self.stored.items())

    def of(self, group: str) -> list[tuple[Trial, dict[str, Any]]]:
        """The trials of a group and what they stored, by seed."""
        chosen = [(trial, stored) for trial, stored in self.stored.items() if trial.group == group]
        return sorted(chosen, key=lambda pair: pair[0].config.seed)

    def stopped_early(self, *groups: str) -> str | None:
        """How many of the trainings of these groups stopped before they converged, and why the first one; None if none.

        See `optimization.stopped_early`.
        """
        of_groups = [stored for group in groups for _, stored in self.of(group)]
        reasons = [stored.get("stopped_early", "no validation episodes") for stored in of_groups]
        early = [reason for reason in reasons if reason]
        return f"{len(early)} of {len(reasons)} trainings ({early[0]})" if early else None

    def table(self, title: str, columns: Mapping[str, str], baseline: str | None = None) -> Table:
        """A row a group, a column a figure (title -> figure); with a baseline also the paired differences from it."""
        rows = [[group, *self.texts(group, columns.values())] for group in self.groups]
        if baseline is not None:
            others = [group for group in self.groups if group != baseline]
            rows += [[f"{g} minus {baseline}", *self.texts(g, columns.values(), minus=baseline)] for g in others]
        return Table(title, ["", *columns], rows)


REPRODUCED, CONTRADICTED, NO_DIFFERENCE, NOT_TESTED = "reproduced", "contradicted", "no difference seen", "not tested"


LEAST_SEEDS = 3  # the spread of two says next to nothing: their interval is 12.7 standard errors wide
FEW_SEEDS = f"fewer than {LEAST_SEEDS} seeds tell no spread"


@dataclass(frozen=True)
class Verdict:
    """What the data say of a claim."""

    claim: str
    source: str
    outcome: str
    evidence: str


@dataclass(frozen=True)
class Claim:
    """A published statement that `group` exceeds `other` in `figure`, or, without groups, why it was not tested."""

    source: str
    statement: str
    group: str = ""
    other: str = ""
    figure: str = ""
    reason: str = ""
    of_converged: bool = False  # whether it is one about networks that were trained to the end

    def judge(self, results: Results) -> Verdict:
        """The paired difference decides where its 95% interval leaves out 0."""
        if not self.group:
            return Verdict(self.statement, self.source, NOT_TESTED, self.reason)
        if results.num_seeds(self.group, self.other) < LEAST_SEEDS:
            return Verdict(self.statement, self.source, NOT_TESTED, FEW_SEEDS)
        early = results.stopped_early(self.group, self.other) if self.of_converged else None
        if early:
            return Verdict(self.statement, self.source, NOT_TESTED, f"base training stopped early: {early}")
        mean, interval = results.difference(self.group, self.other, self.figure)
        if interval is None or math.isnan(mean):
            return Verdict(self.statement, self.source, NOT_TESTED, f"{self.figure} does not exist in every run")
        outcome = NO_DIFFERENCE
        if abs(mean) > interval:
            outcome = REPRODUCED if mean > 0 else CONTRADICTED
        evidence = (
            f"{self.figure}, {self.group} minus {self.other}: {figure_text(self.figure, mean, interval, signed=True)}"
        )
        return Verdict(self.statement, self.source, outcome, evidence)


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    """A row a claim; those that want nothing but seeds share one."""
    seedless = [v for v in verdicts if v.evidence == FEW_SEEDS]
    if len(seedless) > 1:
        sources = ", ".join(dict.fromkeys(v.source for v in seedless))
        shared = Verdict(f"{len(seedless)} differences between methods", sources, NOT_TESTED, FEW_SEEDS)
        verdicts = [shared, *(v for v in verdicts if v.evidence != FEW_SEEDS)]
    rows = [[v.claim, v.source, v.outcome, v.evidence] for v in verdicts]
    title = "Published claims on this data (each by its own 95% interval, none corrected for the number of claims)"
    return Table(title, ["claim", "source", "outcome", "evidence"], rows, numeric=False)


def claims_sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """A sentence for each paper.

    >>> claims_sentences([Verdict("a", "B et al.", REPRODUCED, ""), Verdict("b", "B et al.", NOT_TESTED, "")])
    ['B et al.: of 2 claims 1 reproduced, 0 contradicted, 0 no difference seen, 1 not tested.']
    """
    sentences = []
    for source in dict.fromkeys(v.source for v in verdicts):
        outcomes = [v.outcome for v in verdicts if v.source == source]
        counts = (f"{outcomes.count(o)} {o}" for o in (REPRODUCED, CONTRADICTED, NO_DIFFERENCE, NOT_TESTED))
        sentences.append(f"{source}: of {len(outcomes)} claim{'s' * (len(outcomes) > 1)} {', '.join(counts)}.")
    return sentences


@dataclass(frozen=True)
class Study:
    """Jobs, and how to read what they stored.

    Args:
        name: of its folder.
        title, lead: for the reader: what is compared, on what data, by which protocol.
        trials: the trainings, the longest first.
        columns: what the table shows: title -> figure.
        baseline: group from which paired differences are taken.
        claims: published statements to judge.
        more_jobs: measurements other than trainings.
        more_tables, pictures: what else the report shows, made from the results.
    """

    name: str
    title: str
    lead: str
    trials: Sequence[Trial]
    columns: Mapping[str, str]
    baseline: str | None = None
    claims: Sequence[Claim] = ()
    more_jobs: Sequence[Job] = ()
    more_tables: Callable[[Results], list[Table]] = lambda results: []
    pictures: Callable[[Results], list[Picture]] = lambda results: []

    def __post_init__(self) -> None:
        names = [job.name for job in self.jobs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{self.name}: two trials are called {twice}: seeds and settings must differ")

    @property
    def jobs(self) -> list[Job]:
        return [*self.more_jobs, *self.trials]

    def results(self, folder: Path) -> Results:
        """Of finished trials below `folder`."""
        return Results(folder / self.name, self.trials)

    def tables(self, results: Results) -> list[Table]:
        """The main table, whatever else there is, and the verdicts."""
        seeds = len({trial.config.seed for trial in self.trials})
        title = f"{self.title}; " + (
            f"mean of {seeds} seeds ± 95% (Student's t)" if seeds > 1 else "one seed, ± 95% over episodes or queries"
        )
        tables = [results.table(title, self.columns, self.baseline)] if self.columns else []
        tables += self.more_tables(results)
        if self.claims:
            tables.append(claims_table(self.verdicts(results)))
        return tables

    def verdicts(self, results: Results) -> list[Verdict]:
        """What the data say of each claim."""
        return [claim.judge(results) for claim in self.claims]

    def section(self, results: Results) -> Section:
        """For a report."""
        return Section(self.title, [self.lead], self.tables(results), self.pictures(results))
