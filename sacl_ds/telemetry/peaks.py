"""Peak rates of devices: dense matrix products, by the vendors' data sheets.

FLOP/s of tensor cores without sparsity, accumulating in fp32; fp32 itself without tensor cores. Sources: NVIDIA's data
sheets of B200 (HGX), H200, H100, A100, A40, A30, A10, L40S, L40, L4, V100, V100S, T4; its white papers on GA102 (RTX
3090, RTX A6000) and on Ada (RTX 4090, RTX 6000 Ada); AMD's data sheets of MI300X and MI325X. Data sheets that print
figures with sparsity are halved. A device that is not here, a part of one (MIG), or a variant with other clocks
(laptops, A10G) has no entry: no share is better than a wrong one.
"""

from __future__ import annotations

import re

TERA = 1e12
_COLUMNS = ("bf16", "fp16", "tf32", "fp32")
_PEAKS: dict[str, tuple[float | None, float | None, float | None, float]] = {
    r"(HGX )?B200( SXM\d?)?": (2250, 2250, 1125, 75),
    r"GH200( 480GB)?": (989.5, 989.5, 494.7, 67),
    r"H200( SXM\d?)?( 141GB)?( HBM\w+)?": (989.5, 989.5, 494.7, 67),
    r"H200 NVL": (835.5, 835.5, 417.5, 60),
    r"H100( SXM5?)? \d+GB HBM\w+|H100 SXM5?": (989.5, 989.5, 494.7, 67),
    r"H100 NVL": (835.5, 835.5, 417.5, 60),
    r"H100 PCIe": (756.5, 756.5, 378, 51),
    r"A100-(SXM4|PCIE|PG509)-\d+GB|A100 \d+GB PCIe": (312, 312, 156, 19.5),
    r"A40": (149.7, 149.7, 74.8, 37.4),
    r"A30": (165, 165, 82, 10.3),
    r"A10": (125, 125, 62.5, 31.2),
    r"L40S": (362, 362, 183, 91.6),
    r"L40": (181, 181, 90.5, 90.5),
    r"L4": (121, 121, 60, 30.3),
    r"V100-SXM2-\d+GB": (None, 125, None, 15.7),
    r"V100-PCIE-\d+GB": (None, 112, None, 14),
    r"V100S-PCIE-\d+GB": (None, 130, None, 16.4),
    r"T4": (None, 65, None, 8.1),
    r"GeForce RTX 4090": (165.2, 165.2, 82.6, 82.6),
    r"GeForce RTX 3090": (71, 71, 35.6, 35.6),
    r"RTX A6000": (154.8, 154.8, 77.4, 38.7),
    r"RTX 6000 Ada Generation": (364.2, 364.2, 182.1, 91.1),
    r"Instinct MI300X( OAM)?": (1307.4, 1307.4, 653.7, 163.4),
    r"Instinct MI325X( OAM)?": (1307.4, 1307.4, 653.7, 163.4),
}


def dense_peak(device: str, precision: str) -> float | None:
    """Return a device's peak FLOP/s at bf16, fp16, tf32 or fp32, by its name from `torch.cuda.get_device_name`.

    None where it is not known, or the device has no such arithmetic.
    """
    name = re.sub(r"^(NVIDIA|Tesla|AMD|NVIDIA Tesla) +", "", device.strip())
    for pattern, peaks in _PEAKS.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            peak = peaks[_COLUMNS.index(precision)]
            return None if peak is None else peak * TERA
    return None
