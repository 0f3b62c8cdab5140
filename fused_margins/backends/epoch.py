"""A number that changes whenever a call may go another way than one like it before."""

now = 0


def begin() -> None:
    """Forget what was found out of earlier calls: a memory budget or a kernel module is another one."""
    global now
    now += 1
