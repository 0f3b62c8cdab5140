"""Direct calls of the registered ops with arguments near valid ones: whatever comes, the interpreter stays.

A call that is valid returns; one that returns gives what the public call gives, bit for bit; an error names an
argument, or is torch's own about the schema.
"""

import functools
import random
import re
from typing import Any

import torch

from fused_margins.backends import registry
from fused_margins.ops.fields import Choice, Field, Flag
from tests.ops.suite.hostile import bad_values, valid_calls

OF_TORCH = re.compile(
    r"fused_margins::|can't allocate memory|Storage size calculation overflowed|^backend '\w*' cannot run"
)


@functools.cache
def valid(op: str) -> list[tuple[Any, list[Any]]]:
    return list(valid_calls(registry.OPS[op]))


def case(seed: int, number: int) -> str | None:
    r = random.Random(f"ops {seed} {number}")
    op = registry.OPS[r.choice(sorted(registry.OPS))]
    function, arguments = r.choice(valid(op.name))
    changed = list(arguments)
    places = r.sample(range(len(arguments)), r.choice((0, 1, 1, 1, 2, 2, 3)))
    for i in places:
        changed[i] = r.choice(list(bad_values(arguments[i])))
    called = (
        f"{function._qualified_op_name if hasattr(function, '_qualified_op_name') else function}, changed at "
        + str({i: str(changed[i])[:200] for i in places})
    )
    try:
        results = function(*changed)
    except Exception as error:
        text = str(error)
        if not places:
            return f"a valid call was refused, {error!r}: {called}"
        named = re.match(r"[\w, ]+: ", text) and isinstance(error, TypeError | ValueError | IndexError)
        of_torch = isinstance(error, NotImplementedError) or OF_TORCH.search(text)
        return None if named or of_torch else f"{type(error).__name__} that names no argument, {text[:300]}: {called}"
    return None if function is op.registered_backward else differs(op, changed, results, called)


def differs(op: Any, flat: list[Any], results: Any, called: str) -> str | None:
    """A direct call's results from those of the public one."""
    a, (_, backend) = op.unflat(flat)
    results = [results] if isinstance(results, torch.Tensor) else results
    if any(t.is_meta for t in results):
        return None  # of one tensor without data torch makes a call without any
    # torch hands a flag over as one, and zeros as zeros.
    values = [bool(v) if isinstance(f, Flag) else v for f, v in zip(op.fields.values(), a)]
    values = [v.clone() if isinstance(v, torch.Tensor) and v._is_zerotensor() else v for v in values]
    try:
        a = op.checked(op.arguments._make(map(_option, op.fields.items(), values)))
        public = op.run(a, backend)
    except Exception as error:
        return f"returned, where the public call raises {error!r}: {called}"
    public = [public] if isinstance(public, torch.Tensor) else list(public)
    given = [t for t, out in zip(results, op.results.values()) if out.given(a)]
    same = len(given) == len(public) and all(map(torch.equal, *([t.nan_to_num(7) for t in o] for o in (given, public))))
    return None if same else f"another result than the public call's: {called}"


def _option(named: tuple[str, Field], value: Any) -> Any:
    return named[1].options(value) if isinstance(named[1], Choice) else value
