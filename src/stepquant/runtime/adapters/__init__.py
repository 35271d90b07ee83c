"""LoRA beside integer layers."""
