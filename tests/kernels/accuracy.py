"""A program: errors of gradients with exponentials kept, beside those without, interpreted with a GPU's rounding.

TRITON_INTERPRET=1 python -m tests.kernels.accuracy
"""

import torch

from fused_margins.backends import budget
from fused_margins.backends.triton import launch
from tests import interpreter

from .test_exponentials import error, gradients, rows_of

ROWS, WIDTH, CLASSES = 40, 32, 300
KINDS = ("random", "trained", "opposed", "equal", "narrow cone")


def main() -> None:
    if not launch.interpreted:
        raise SystemExit("expected TRITON_INTERPRET=1 in the environment")
    interpreter.patch_the_language_once()
    interpreter.round_to_nearest()
    interpreter.add_up_products_alike()
    print("| rows | scale | angle | x, kept | x | y, kept | y |\n|---|---:|---:|---:|---:|---:|---:|")
    for kind in KINDS:
        for scale, angle in ((30.0, 0.0), (64.0, 0.0), (30.0, 0.5)):
            x, y, target = rows_of("random" if kind == "narrow cone" else kind, ROWS, WIDTH, CLASSES)
            if kind == "narrow cone":  # all cosines near 0.9
                x, y = (x[:1] + 0.33 * t for t in (x, y))
            options = {"scale": scale, "angle_rad": angle, "margin": 0.1, "epilogue": "margin_softmax"}
            truth = gradients(x.double(), y.double(), target, "reference", **options)
            found = []
            for num_bytes in (None, 0):
                with budget.within_exponential_budget(num_bytes):
                    found.append(gradients(x, y, target, "triton", **options))
            cells = [f"{error(found[n][side], truth[side]):.1e}" for side in (0, 1) for n in (0, 1)]
            print(f"| {kind} | {scale:g} | {angle:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
