"""What figures depend on besides what was asked for."""

import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import moelora


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and versions."""
    return {
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu(),
        "threads": torch.get_num_threads(),
        "instruction_set": moelora.get_isa(),
        "python": platform.python_version(),
        "moelora": moelora.__version__,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }


def cpu() -> str:
    """The name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
