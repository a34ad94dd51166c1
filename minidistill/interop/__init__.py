"""What other programs read and write: single files, LoRA files, TAESD, model cards, uploads."""
