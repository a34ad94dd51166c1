"""The two papers: block removal and knowledge distillation (BK-SDM), fewer steps (SDXL-Lightning)."""
