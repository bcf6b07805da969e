"""Parts of the study of LoRA and bits: its runs, their measurement and its pictures."""
