"""LoRA adapters of PEFT into a subspace, out of one, and several of them in one basis."""

from tinyspan.interop.lora import (
    PEFT_FILES,
    Exported,
    Lora,
    Sharing,
    export_lora,
    import_lora,
    lora_basis,
    peft_config,
    peft_labels,
    peft_tensors,
    read_lora,
    sharing,
)

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
