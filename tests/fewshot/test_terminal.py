"""The progress bar where there is a terminal, and silence where there is none."""

import io

from rich.console import Console

from fused_margins.fewshot.terminal import progress


def _advance(console):
    with progress("training [sic]", total=4, unit="steps", completed=1, console=console) as advance:
        for _ in range(3):
            advance()


def test_a_terminal_sees_count_rate_and_remaining_time():
    output = io.StringIO()
    _advance(Console(file=output, force_terminal=True, width=100))
    text = output.getvalue()
    assert "training [sic]" in text
    assert "4/4" in text
    assert " steps/s" in text
    assert "0:00:00" in text


def test_a_file_sees_nothing():
    output = io.StringIO()
    _advance(Console(file=output))
    assert output.getvalue().strip() == ""
