"""What kernels have to know of a GPU: how its matrix units are fed."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Family:
    """GPUs whose kernels are cut alike."""

    multiplies_e4m3: bool
    """Matrix units take e4m3 as PyTorch has it; where not, codes are widened to half precision first."""
    reads_shared: bool
    """Matrix units read their factors from shared memory, not from registers."""
    lanes: int
    """Of a warp."""


HOPPER = Family(multiplies_e4m3=True, reads_shared=True, lanes=32)
"""And what came after it; matrix units of before Hopper read registers."""
ADA = Family(multiplies_e4m3=True, reads_shared=False, lanes=32)
AMPERE = Family(multiplies_e4m3=False, reads_shared=False, lanes=32)
CDNA = Family(multiplies_e4m3=False, reads_shared=False, lanes=64)
"""AMD Instinct; the MI300's own e4m3 has another bias."""
RDNA = Family(multiplies_e4m3=False, reads_shared=False, lanes=32)
"""AMD Radeon."""


def family_of(device: torch.device) -> Family:
    """That of a device; of one that is no GPU the oldest, for Triton's interpreter."""
    if device.type != "cuda":
        return AMPERE
    if torch.version.hip is not None:
        return CDNA if torch.cuda.get_device_properties(device).warp_size == CDNA.lanes else RDNA
    capability = torch.cuda.get_device_capability(device)
    return HOPPER if capability >= (9, 0) else ADA if capability >= (8, 9) else AMPERE
