"""`fused-margins doctor`."""

from dataclasses import dataclass

from ... import doctor


@dataclass(frozen=True)
class Doctor:
    """Show versions and backends, and check every backend against the reference (ten seconds)."""

    device: str = "cpu"
    """Device to check: cpu or cuda."""

    def main(self) -> int:
        return doctor.main(["--device", self.device])
