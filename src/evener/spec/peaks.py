"""Published peak rates of accelerators, from their makers' data sheets. Nothing here was measured.

Rates of matrix products are those without sparsity, with 32-bit accumulation; bandwidths of links are those of one
direction. No device reaches its peaks: what share is assumed to be reached is said in `evener.cost.published`.
"""

from msgspec import Struct, structs

from evener.errors import InvalidDevice
from evener.units import Bytes


class Peaks(Struct, frozen=True):
    """What one device can do at best."""

    flops: tuple[tuple[str, float], ...]
    """(dtype, flop/s) of dense matrix products."""
    bandwidth: float
    """Bytes per second of its memory."""
    memory: Bytes
    """All of it; what the driver keeps is not taken off."""
    link: str = "pcie4"
    """How it reaches its neighbours in one host: a key of `HOST_LINKS`."""
    source: str = ""
    """The data sheet."""
    name: str = ""
    """Key of `PUBLISHED`; empty for peaks that a user gave."""

    def flop_rate(self, dtype: str) -> float | None:
        """Flop/s of that dtype; None where the device has no such units."""
        return dict(self.flops).get(dtype)


HOST_LINKS: dict[str, float] = {
    "nvlink5": 900e9,
    "nvlink4": 450e9,
    "nvlink3": 300e9,
    "nvlink2": 150e9,
    "infinity-fabric": 448e9,
    "pcie5": 64e9,
    "pcie4": 32e9,
    "pcie3": 16e9,
    "memory": 20e9,
}
"""Bytes per second in one direction between two devices of one host (x16 for PCIe; `memory`: CPU workers)."""

GB = 10**9


def _sheet(
    source: str, memory_gb: float, bandwidth: float, link: str, *, fp32: float, half: float, bf16: bool = True,
    int8: float | None = None, fp8: float | None = None,
) -> Peaks:  # fmt: skip
    """Rates in Tflop/s, bandwidth in GB/s."""
    rates: list[tuple[str, float]] = [("fp32", fp32), ("fp16", half)]
    rates += [("bf16", half)] if bf16 else []
    rates += [(name, rate) for name, rate in (("int8", int8), ("fp8", fp8)) if rate is not None]
    return Peaks(
        tuple((name, rate * 1e12) for name, rate in rates), bandwidth * 1e9, Bytes(int(memory_gb * GB)), link, source
    )


H100, A100 = "NVIDIA H100 data sheet (2023)", "NVIDIA A100 80GB data sheet (2021)"
PUBLISHED: dict[str, Peaks] = {
    "b200_sxm": _sheet("NVIDIA HGX B200 data sheet (2025), per GPU", 180, 7700, "nvlink5", fp32=75, half=2250,
                       int8=4500, fp8=4500),
    "h200_sxm": _sheet("NVIDIA H200 data sheet (2024)", 141, 4800, "nvlink4", fp32=67, half=989, int8=1979, fp8=1979),
    "h100_sxm": _sheet(H100, 80, 3350, "nvlink4", fp32=67, half=989, int8=1979, fp8=1979),
    "h100_pcie": _sheet(H100, 80, 2000, "pcie5", fp32=51, half=756, int8=1513, fp8=1513),
    "a100_sxm_80gb": _sheet(A100, 80, 2039, "nvlink3", fp32=19.5, half=312, int8=624),
    "a100_sxm_40gb": _sheet("NVIDIA A100 data sheet (2020)", 40, 1555, "nvlink3", fp32=19.5, half=312, int8=624),
    "a100_pcie_80gb": _sheet(A100, 80, 1935, "pcie4", fp32=19.5, half=312, int8=624),
    "a30": _sheet("NVIDIA A30 data sheet (2021)", 24, 933, "pcie4", fp32=10.3, half=165, int8=330),
    "a10": _sheet("NVIDIA A10 data sheet (2021)", 24, 600, "pcie4", fp32=31.2, half=125, int8=250),
    "l40s": _sheet("NVIDIA L40S data sheet (2023)", 48, 864, "pcie4", fp32=91.6, half=362, int8=733, fp8=733),
    "l4": _sheet("NVIDIA L4 data sheet (2023), half of the sparse rates", 24, 300, "pcie4", fp32=30.3, half=121,
                 int8=242, fp8=242),
    "t4": _sheet("NVIDIA T4 data sheet (2019)", 16, 320, "pcie3", fp32=8.1, half=65, bf16=False, int8=130),
    "v100_sxm_32gb": _sheet("NVIDIA V100 data sheet (2020)", 32, 900, "nvlink2", fp32=15.7, half=125, bf16=False),
    "rtx_3090": _sheet("NVIDIA GA102 white paper (2020), appendix A", 24, 936, "pcie4", fp32=35.6, half=71, int8=284),
    "rtx_4090": _sheet("NVIDIA Ada white paper (2022), appendix A", 24, 1008, "pcie4", fp32=82.6, half=165.2,
                       int8=660.6, fp8=330.3),
    "rtx_5090": _sheet("NVIDIA RTX Blackwell white paper (2025), appendix A", 32, 1792, "pcie5", fp32=104.8,
                       half=209.5, int8=838, fp8=419),
    "rtx_pro_6000": _sheet("NVIDIA RTX PRO Blackwell white paper (2025), workstation edition", 96, 1792, "pcie5",
                           fp32=126, half=503.8, int8=1007.6, fp8=1007.6),
    "mi300x": _sheet("AMD Instinct MI300X data sheet (2023)", 192, 5300, "infinity-fabric", fp32=163.4, half=1307.4,
                     int8=2614.9, fp8=2614.9),
}  # fmt: skip


PUBLISHED = {name: structs.replace(sheet, name=name) for name, sheet in PUBLISHED.items()}


def published(name: str) -> Peaks:
    """The sheet of that name. Raises InvalidDevice listing the ones there are."""
    if name not in PUBLISHED:
        raise InvalidDevice(
            f"no published peaks for {name!r} (there are: {', '.join(sorted(PUBLISHED))}); "
            "give `peaks` with flops and bandwidth instead"
        )
    return PUBLISHED[name]
