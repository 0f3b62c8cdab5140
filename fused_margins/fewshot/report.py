"""What is left of a single run for a reader: report.json, report.md and the plots."""

from typing import Any

from .datasets import Task
from .plots import embedding_maps, loss_curves, plane
from .runs import Run, write_json, write_text
from .tables import Table, percent
from .trainer import Trainer


def figures_table(figures: dict[str, Any]) -> Table:
    """Every figure with its interval, where it has one."""
    rows = []
    for name, value in figures.items():
        if name.endswith("_interval"):
            continue
        # phi is a ratio, all else are fractions
        text = f"{value:.2f}" if "discriminability" in name else percent(value, figures.get(f"{name}_interval"))
        rows.append([name.replace("_", " "), text])
    return Table(
        "Evaluation (percent, ± half of the 95% interval; discriminability is a ratio)", ["figure", "value"], rows
    )


def write_run_report(run: Run, trainer: Trainer, task: Task, figures: dict[str, Any]) -> Table:
    """Write the report of a run into its folder and return its table."""
    table = figures_table(figures)
    judged = task.held_out if task.held_out is not None else task.novel
    plots = ["loss.png"]
    curve = [row["loss"] for row in trainer.history]
    loss_curves(run.folder / "loss.png", {trainer.config.dataset: {trainer.config.loss.name: curve}})
    if judged is not None:
        embeddings = trainer.embed(judged).cpu()
        embedding_maps(
            run.folder / "embeddings.png",
            {trainer.config.loss.name: plane(embeddings)},
            judged.labels,
            judged.class_names,
        )
        plots.append("embeddings.png")
    config = trainer.config.model_dump(mode="json")
    write_json(run.folder / "report.json", {"config": config, "figures": figures, "epochs": trainer.epoch})
    pictures = "\n".join(f"![{name}]({name})" for name in plots)
    write_text(
        run.folder / "report.md",
        f"# {config['loss']['name']} on {config['dataset']}\n\n"
        f"{trainer.epoch} of {config['epochs']} epochs, seed {config['seed']}, backend {config['backend']}; "
        "all settings are in [config.json](config.json).\n\n"
        f"{table.markdown()}\n\n{pictures}\n",
    )
    return table
