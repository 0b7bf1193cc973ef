"""LoRA adapters of PEFT into a subspace, out of one, and several of them in one basis."""

from tinyspan.interop import lora as _lora
from tinyspan.interop.lora import *  # noqa: F403

__all__ = _lora.__all__
