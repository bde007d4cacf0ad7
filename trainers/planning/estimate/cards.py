"""Cards that runs are planned for, with the makers' numbers."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    Attributes:
        name: As sold.
        memory: GiB.
        half_tflops: Published dense bf16 peak with float32 accumulation, TFLOP/s.
        float_tflops: Published float32 peak without tensor cores, TFLOP/s.
    """

    name: str
    memory: int
    half_tflops: float
    float_tflops: float

    @property
    def reserve(self) -> int:
        """Bytes left for the CUDA context, libraries' workspaces and fragmentation: 0.75 GiB and 4%; an assumption."""
        return int(0.75 * GIB + 0.04 * self.memory * GIB)

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return self.memory * GIB - self.reserve

    def peak(self, precision: str) -> float:
        """Published peak of a precision, FLOP/s."""
        return 1e12 * (self.float_tflops if precision == "fp32" else self.half_tflops)


CARDS = (
    Card(name="RTX 4080 16 GB", memory=16, half_tflops=97.5, float_tflops=48.7),
    Card(name="RTX 4090 24 GB", memory=24, half_tflops=165.2, float_tflops=82.6),
    Card(name="A100 40 GB", memory=40, half_tflops=312.0, float_tflops=19.5),
    Card(name="H100 SXM 80 GB", memory=80, half_tflops=989.4, float_tflops=66.9),
)
