"""The demonstration's outcomes as tables, plots, report.json and report.md."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .datasets import load
from .demo import COARSE_TO_FINE, DATASET, MARGIN_SCALE, MARGINS, NUM_BASE_CLASSES, Outcome
from .doctor import versions
from .maps import embedding_maps
from .metrics import mean_and_student_interval
from .parity import TOLERANCE
from .plots import difference_curves, loss_curves, sweep
from .runs import write_json, write_text
from .tables import Table, percent

EASY, RANDOM = "triplet, easy positives", "triplet, random positives"
KNC_LIMIT = 0.03
NOTES = f"""± is half the width of the 95% interval over seeds (Student's t); pairs are of equal seed.

Parity: at every step of a training the second backend also gets the weights and the batch of the first; the largest
relative differences of loss and gradients are shown. Beside that it trains on its own: *steps together* counts the
steps before the losses of the two runs part by more than {TOLERANCE:g}. Later they drift, as any two runs do whose
arithmetic differs in the last bit; the third figure is such a run on the first backend alone, its first weights changed
by one bit. The triplet loss takes nothing but indices from a backend: where both choose the same pairs its figures are
equal to the bit."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A statement about the outcomes, and whether they bear it out."""

    statement: str
    measured: str
    holds: bool


class DemoReport:
    """Outcomes of one demonstration, sorted by part and name; the runs of a name stand in the order of their seeds."""

    def __init__(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        self.outcomes, self.seconds = outcomes, seconds
        self.seeds = sorted({o.job.config.seed for o in outcomes if o.job.part == "coarse_to_fine"})

    def of(self, part: str, name: str | None = None) -> list[Outcome]:
        chosen = [o for o in self.outcomes if o.job.part == part and name in (None, o.job.name)]
        return sorted(chosen, key=lambda o: o.job.config.seed)

    def values(self, part: str, name: str, figure: str) -> list[float]:
        """One value a seed."""
        return [o.figures[0][figure] for o in self.of(part, name)]

    def difference(self, part: str, name: str, other: str, figure: str) -> tuple[float, float]:
        """Mean of name - other on the same seeds, and half the width of its interval."""
        pairs = zip(self.values(part, name, figure), self.values(part, other, figure))
        return mean_and_student_interval([a - b for a, b in pairs])

    def coarse_to_fine_table(self) -> Table:
        columns = {"Recall@1": "recall@1", "NMI": "nmi", "purity": "purity", "kNC error": "knc_error"}
        rows = []
        for name in COARSE_TO_FINE:
            cells = [
                percent(*mean_and_student_interval(self.values("coarse_to_fine", name, f))) for f in columns.values()
            ]
            rows.append([name, *cells])
        cells = [percent(*self.difference("coarse_to_fine", EASY, RANDOM, figure)) for figure in columns.values()]
        rows.append(["easy minus random, paired", *cells])
        title = f"Coarse to fine: trained on even/odd, judged on ten digits; %, mean of {len(self.seeds)} seeds ± 95%"
        return Table(title, ["method", *columns], rows)

    def margins_table(self) -> Table:
        columns = {
            "1-shot": "novel_1shot",
            "5-shot": "novel_5shot",
            "base accuracy": "accuracy",
            "novel NMI": "novel_nmi",
        }
        rows = []
        for margin in MARGINS:
            name = f"{margin:g}"
            cells = [percent(*mean_and_student_interval(self.values("margins", name, f))) for f in columns.values()]
            cells += [
                percent(*self.difference("margins", name, "0", f)) if margin else "-"
                for f in ("novel_1shot", "novel_5shot")
            ]
            rows.append([name, *cells])
        title = (
            f"Margins at scale {MARGIN_SCALE:g}: {NUM_BASE_CLASSES} base digits, 5-way episodes on the others; "
            f"%, mean of {len(self.seeds)} seeds (each with its own base digits) ± 95%"
        )
        return Table(title, ["margin", *columns, "1-shot minus m = 0", "5-shot minus m = 0"], rows)

    def parity_table(self) -> Table | None:
        outcomes = self.of("parity")
        if not outcomes:
            return None
        first, second = outcomes[0].job.backends or ("", "")
        rows = []
        for o in outcomes:
            loss = max(d.loss_difference for d in o.differences)
            gradient = max(d.gradient_difference for d in o.differences)
            parted = next((d.step for d in o.differences if d.drift > TOLERANCE), len(o.differences))
            rows.append(
                [o.job.name, f"{loss:.1e}", f"{gradient:.1e}", f"{parted} of {len(o.differences)}"]
                + [" / ".join(percent(f[figure]) for f in o.figures) for figure in ("recall@1", "nmi", "knc_error")]
            )
        title = f"Parity of {first} and {second}; at the end, %: {first} / {second} / {first}, one bit changed"
        columns = ["loss", "loss differs", "gradient differs", "steps together", "Recall@1", "NMI", "kNC error"]
        return Table(title, columns, rows)

    def checks(self) -> list[Check]:
        gain, interval = self.difference("coarse_to_fine", EASY, RANDOM, "nmi")
        error, _ = mean_and_student_interval(self.values("coarse_to_fine", "magnet", "knc_error"))
        checks = [
            Check("easy positives beat random positives in NMI", f"{percent(gain, interval)} points", gain > 0),
            Check(f"magnet kNC error is below {percent(KNC_LIMIT)}%", f"{percent(error)}%", error < KNC_LIMIT),
        ]
        differences = [d for o in self.of("parity") for d in o.differences]
        if differences:
            worst = max(max(d.loss_difference, d.gradient_difference) for d in differences)
            checks.append(
                Check(f"backends agree within {TOLERANCE:g} at every step", f"{worst:.1e}", worst <= TOLERANCE)
            )
        return checks

    def checks_table(self) -> Table:
        rows = [[c.statement, c.measured, "yes" if c.holds else "NO"] for c in self.checks()]
        return Table("Checks", ["statement", "measured", "holds"], rows)

    def tables(self) -> list[Table]:
        tables = [self.coarse_to_fine_table(), self.margins_table(), self.parity_table(), self.checks_table()]
        return [table for table in tables if table is not None]

    def print(self, console: Console) -> None:
        for table in self.tables():
            console.print(table.rich())

    def write(self, folder: Path) -> None:
        """report.json, parity.jsonl, report.md and the plots, each whole or not at all."""
        plots = self._write_plots(folder)
        write_json(folder / "report.json", self._json())
        steps = [{"loss_name": o.job.name} | dataclasses.asdict(d) for o in self.of("parity") for d in o.differences]
        write_text(folder / "parity.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
        parts = [
            "# fused-margins demo",
            f"Digits, seeds {', '.join(map(str, self.seeds))}, {self.seconds:.0f} s. "
            + ", ".join(f"{name} {version}" for name, version in versions().items())
            + ".",
            *(table.markdown() for table in self.tables()),
            NOTES,
            *(f"![{name}]({name})" for name in plots),
        ]
        write_text(folder / "report.md", "\n\n".join(parts) + "\n")

    def _write_plots(self, folder: Path) -> list[str]:
        seed = self.seeds[0]
        mapped = [o for o in self.of("coarse_to_fine") if o.job.config.seed == seed]
        loss_curves(folder / "loss.png", {f"digits, seed {seed}": {o.job.name: o.losses[0] for o in mapped}})
        test = load(DATASET)["test"]
        maps = {o.job.name: (o.points, test.labels, test.class_names) for o in mapped if o.points is not None}
        embedding_maps(folder / "embeddings.png", maps)
        titles = {
            "novel_1shot": "1-shot",
            "novel_5shot": "5-shot",
            "accuracy": "base accuracy",
            "novel_nmi": "novel NMI",
            "novel_discriminability": "novel phi",
        }
        panels = {
            title: {title: [self.values("margins", f"{margin:g}", figure) for margin in MARGINS]}
            for figure, title in titles.items()
        }
        sweep(folder / "margins.png", MARGINS, panels)
        names = ["loss.png", "embeddings.png", "margins.png"]
        parity = self.of("parity")
        if parity:
            models = [*(parity[0].job.backends or ()), "control: one bit changed"]
            loss_curves(folder / "parity_loss.png", {o.job.name: dict(zip(models, o.losses)) for o in parity})
            gradients = {o.job.name: [d.gradient_difference for d in o.differences] for o in parity}
            difference_curves(folder / "parity.png", gradients, TOLERANCE)
            names += ["parity_loss.png", "parity.png"]
        return names

    def _json(self) -> dict[str, Any]:
        runs = [
            {
                "part": o.job.part,
                "name": o.job.name,
                "config": o.job.config.model_dump(mode="json"),
                "backends": o.job.backends,
                "figures": o.figures,
                "losses": o.losses,
                "seconds": o.seconds,
            }
            for o in self.outcomes
        ]
        return {
            "versions": versions(),
            "seconds": self.seconds,
            "seeds": self.seeds,
            "checks": [dataclasses.asdict(check) for check in self.checks()],
            "tables": [dataclasses.asdict(table) for table in self.tables()],
            "runs": runs,
        }
