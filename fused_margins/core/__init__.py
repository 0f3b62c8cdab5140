"""Plain torch that every storey above stands on: similarities, margins, reductions, checks. It imports none of them."""
