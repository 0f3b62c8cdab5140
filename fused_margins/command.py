"""The command `fused-margins`. What needs torch and numpy alone runs without the extras that the trainer needs."""

import importlib
import sys

WITHOUT_EXTRAS = {"doctor": "fused_margins.doctor", "plan": "fused_margins.distributed.plan"}
USER_ERROR = 2


def main() -> None:
    """Hands over to the module of the subcommand."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked in WITHOUT_EXTRAS:
        sys.exit(importlib.import_module(WITHOUT_EXTRAS[asked]).main(sys.argv[2:]))
    try:
        trainer = importlib.import_module("fused_margins.fewshot.cli")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("fused_margins"):
            raise
        print(
            f'error: the trainer needs {error.name}, which is not installed: pip install "fused-margins[fewshot]"; '
            f"{' and '.join(WITHOUT_EXTRAS)} run without it",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    trainer.script()


if __name__ == "__main__":
    main()
