"""Interoperation with other libraries: the Hugging Face Trainer, LoRA adapters of PEFT, files of changed weights."""
