"""LoRA adapters in PEFT's format: export, import, and the shared basis of several adapters."""

from tinyspan.interop.lora.common import PEFT_FILES, peft_config, peft_labels, peft_tensors
from tinyspan.interop.lora.incoming import Lora, import_lora, read_lora
from tinyspan.interop.lora.outgoing import Exported, export_lora
from tinyspan.interop.lora.shared import Sharing, lora_basis, sharing

__all__ = [
    "PEFT_FILES",
    "Exported",
    "Lora",
    "Sharing",
    "export_lora",
    "import_lora",
    "lora_basis",
    "peft_config",
    "peft_labels",
    "peft_tensors",
    "read_lora",
    "sharing",
]
