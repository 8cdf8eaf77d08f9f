"""What a machine can do: a table of GPUs from their data sheets, or figures that the user gives."""

import os
from dataclasses import dataclass, fields

from sae_transfer.errors import StudyError

# What large products and copies reach of a data sheet's figures: on an H200, 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s.
SUSTAINED_MATRIX, SUSTAINED_BANDWIDTH = 0.8, 0.9


@dataclass(frozen=True)
class Device:
    """Rates that large matrix products and large copies sustain.

    Attributes:
        name: For messages.
        tflops: Products in bfloat16, 1e12 operations a second.
        tflops_float32: Products in true float32, which evaluation uses.
        gbps: Memory bandwidth, 1e9 bytes a second.
        gib: Memory, GiB.
    """

    name: str
    tflops: float
    tflops_float32: float
    gbps: float
    gib: float

    @property
    def rates(self) -> dict[str, float]:
        """Operations a second by precision; TF32 runs at half the rate of bfloat16 on every GPU that has both."""
        float32 = self.tflops_float32 * 1e12
        return {
            "bfloat16": self.tflops * 1e12,
            "tf32": max(float32, self.tflops * 1e12 / 2),
            "float32": float32,
        }


def _gpu(name: str, tflops: float, tflops_float32: float, gbps: float, gib: float) -> Device:
    return Device(
        name,
        SUSTAINED_MATRIX * tflops,
        SUSTAINED_MATRIX * tflops_float32,
        SUSTAINED_BANDWIDTH * gbps,
        gib,
    )


# Data-sheet figures: dense bfloat16 with float32 accumulation, float32 outside the tensor cores, bandwidth. Memory is
# what the driver offers: data-centre cards with GDDR6 keep a sixteenth of the sheet's for error correction.
GPUS = (
    _gpu("h200", 989, 67, 4800, 140),  # NVIDIA H200 data sheet, SXM
    _gpu("h100", 989, 67, 3350, 79.5),  # NVIDIA H100 data sheet, SXM
    _gpu("h100-pcie", 756, 51, 2000, 79.5),  # NVIDIA H100 data sheet, PCIe
    _gpu("a100-80", 312, 19.5, 2039, 80),  # NVIDIA A100 data sheet, 80 GB SXM
    _gpu("a100-40", 312, 19.5, 1555, 40),  # NVIDIA A100 data sheet, 40 GB
    _gpu("l40s", 362, 91.6, 864, 45),  # NVIDIA L40S data sheet
    _gpu("l4", 121, 30.3, 300, 22.5),  # NVIDIA L4 data sheet
    _gpu("a40", 149.7, 37.4, 696, 45),  # NVIDIA A40 data sheet
    _gpu("a10", 125, 31.2, 600, 22.5),  # NVIDIA A10 data sheet
    _gpu("a6000", 154.8, 38.7, 768, 48),  # NVIDIA RTX A6000 data sheet
    _gpu("rtx6000-ada", 364, 91.1, 960, 48),  # NVIDIA RTX 6000 Ada data sheet
    _gpu("rtx4090", 165, 82.6, 1008, 24),  # NVIDIA Ada GPU architecture white paper
    _gpu("rtx3090", 71, 35.6, 936, 24),  # NVIDIA GA102 white paper
    _gpu("t4", 8.1, 8.1, 320, 15),  # NVIDIA T4 data sheet; no bfloat16, so at the rate of float32 at best
)


def cpu_of_this_machine() -> Device:
    """A guess, to tell minutes from days: each core that may be used as fast as one of an EPYC; this machine's memory.

    That core multiplies matrices at 0.08 TFLOP/s and copies at 17 GB/s (results/benchmarks/check.json); all cores share
    the bandwidth.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 16.0
    return Device("cpu", 0.08 * n_cores, 0.08 * n_cores, 17, gib)


def find_device(name: str) -> Device:
    """A GPU of the table, or `cpu`.

    Raises:
        StudyError: The table does not have it.
    """
    if name == "cpu":
        return cpu_of_this_machine()
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise StudyError(
        f"--on: got {name}; known are {', '.join(gpu.name for gpu in GPUS)} and cpu",
        "give its figures: --device-spec tflops=790,tflops_float32=54,gbps=4300,gib=141",
    )


def choose_device(name: str | None, spec: str | None, *, asked: str) -> tuple[Device, bool]:
    """What `check` estimates for.

    Args:
        name: Of the table, or `cpu`.
        spec: Figures instead.
        asked: `compute.device` of the study, which decides when neither is given, and what `spec` describes.

    Returns:
        The device, and whether it is a GPU.

    Raises:
        StudyError: Both are given, or it is not to be understood.
    """
    if name is not None and spec is not None:
        raise StudyError("--on and --device-spec: both say which device", "leave out one of them")
    if spec is not None:
        return parse_device(spec), asked != "cpu"
    name = name or ("cpu" if asked == "cpu" else "h100")
    return find_device(name), name != "cpu"


def parse_device(spec: str) -> Device:
    """A device by its own figures, measured ones by preference.

    Args:
        spec: `tflops=790,tflops_float32=54,gbps=4300,gib=141`. Without `tflops_float32`, a fifteenth of `tflops`, as on
            data-centre GPUs.

    Raises:
        StudyError: A figure is missing, unknown or no number above zero.
    """
    known = [field.name for field in fields(Device) if field.name != "name"]
    example = "--device-spec tflops=790,tflops_float32=54,gbps=4300,gib=141"
    figures: dict[str, float] = {}
    for part in spec.split(","):
        key, _, text = (word.strip() for word in part.partition("="))
        try:
            figures[key] = float(text)
        except ValueError:
            raise StudyError(f"--device-spec: got {part!r}; expected KEY=NUMBER", example) from None
        if key not in known or not 0 < figures[key] < float("inf"):
            raise StudyError(f"--device-spec: got {part!r}; expected {', '.join(known)}, numbers above 0", example)
    figures.setdefault("tflops_float32", figures.get("tflops", 0) / 15)
    missing = [key for key in known if key not in figures]
    if missing:
        raise StudyError(f"--device-spec: {' and '.join(missing)} missing", example)
    return Device(spec, **figures)
