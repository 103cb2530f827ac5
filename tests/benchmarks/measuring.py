"""What every benchmark measures with: warm medians, their spread, and the machine's ceilings.

Whatever is compared is measured in turns within one run, so that what else runs on the machine
slows both sides alike. A stage's floor is taken from the quickest matrix product of the run so far.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package of this checkout

import torch

SIZE = {"cpu": 1024, "cuda": 4096}  # of the square matrices whose product is the ceiling
SCALE = {"ms": 1e3, "s": 1.0, "x": 1.0, "%": 100.0, "MB": 1e-6, "GB": 1e-9, "": 1.0}


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: what was measured.
        values: of all repeats: seconds, bytes or a ratio.
        unit: what they are shown in.
        floor: the least that it could be on this machine, in the same unit; None where none is
            stated.
        goal: what it should reach, in words.
        note: shapes.
    """

    name: str
    values: list[float]
    unit: str
    floor: float | None = None
    goal: str = ""
    note: str = ""

    @property
    def middle(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        scale = SCALE[self.unit]
        middle, low, high = (scale * f(self.values) for f in (median, min, max))
        spread = f"({low:.3g} - {high:.3g})" if len(self.values) > 1 else ""
        floor = ""
        if self.floor is not None:
            share = self.floor / self.middle
            floor = f"floor {scale * self.floor:.3g} {self.unit}, {share:.0%} of it"
        tail = "; ".join(part for part in (floor, self.goal, self.note) if part)
        return f"{self.name:52} {middle:9.4g} {self.unit:2} {spread:20} {tail}"

    def document(self) -> dict[str, Any]:
        """As it goes to the JSON file."""
        return asdict(self) | {"median": self.middle}


def synchronize(device: str) -> None:
    """Wait for a device to have done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def timed(
    work: dict[str, Callable[[], object]],
    beside: Callable[[], object],
    repeats: int,
    device: str = "cpu",
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each piece of work and of what runs right before it, after an uncounted turn."""
    found: dict[str, list[float]] = {name: [] for name in work}
    neighbours: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, run in work.items():
            pair = seconds(beside, device), seconds(run, device)
            if turn:
                neighbours[name].append(pair[0])
                found[name].append(pair[1])
    return found, neighbours


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """Ratio of each pair."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


class Ceilings:
    """What the machine can do: float32 matrix products, and moving bytes.

    Attributes:
        device: "cpu" or "cuda".
        rate: floating-point operations a second of a large square product, the quickest so far.
        bandwidth: bytes a second, read and written, of a copy that no cache holds.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        size = SIZE[device]
        self._a, self._b = (torch.randn(size, size, device=device) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self.operations = 2.0 * size**3
        self.rate = self.operations / min(seconds(self.product, device) for _ in range(12))
        x = torch.empty(1 << (26 if device == "cpu" else 29), device=device)
        y = torch.empty_like(x)
        moved = min(seconds(lambda: y.copy_(x), device) for _ in range(5))
        self.bandwidth = 2 * x.nbytes / moved

    def product(self) -> None:
        """One product of the kind that the rate is of."""
        torch.mm(self._a, self._b, out=self._out)

    def floor(self, flops: float, moved: float = 0.0) -> float:
        """Seconds that so many operations and bytes take at least."""
        return max(flops / self.rate, moved / self.bandwidth)

    def stage(
        self,
        name: str,
        run: Callable[[], object],
        repeats: int,
        flops: float,
        moved: float = 0.0,
        goal: str = "",
        note: str = "",
    ) -> Row:
        """Time a stage, in turns with products that may show the machine to be quicker."""
        found, products = timed({name: run}, self.product, repeats, self.device)
        self.rate = max(self.rate, self.operations / min(products[name]))
        return Row(name, found[name], "s", self.floor(flops, moved), goal, note)


def machine(device: str, ceilings: Ceilings, repeats: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": _processor(),
        "repeats": repeats,
        "float32 products, GFLOP/s": round(ceilings.rate / 1e9, 1),
        "copy, GB/s": round(ceilings.bandwidth / 1e9, 1),
    }
    if device != "cpu":
        about["machine"] = torch.cuda.get_device_name()
    return about


def _processor() -> str:
    """The processor, as far as the system tells, and the widest instructions that torch uses."""
    told = [f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        said = {name.strip(): value.strip() for name, _, value in lines}
        names = ("model name", "cpu family", "model", "stepping")
        told += [f"{name} {said[name]}" for name in names if name in said]
    return ", ".join(told).replace("model name ", "")
