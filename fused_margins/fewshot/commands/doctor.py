"""`fused-margins doctor`."""

from dataclasses import dataclass

from .. import doctor
from ..terminal import console
from ..trainer import usable_device


@dataclass(frozen=True)
class Doctor:
    """Show versions, compiler and backends, and check every available backend against the reference (ten seconds)."""

    device: str = "cpu"
    """Device to check: cpu or cuda."""

    def main(self) -> int:
        usable_device(self.device)
        console.print(doctor.environment_table().rich())
        console.print(doctor.backends_table(self.device).rich())
        table, agrees = doctor.self_check(self.device)
        console.print(table.rich())
        return 0 if agrees else 1
