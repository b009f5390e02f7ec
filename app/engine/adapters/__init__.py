"""LoRA and LoKr adapters: a file of any layout becomes branches of the transformer's layers."""
