"""Parts of the study `lora_and_bits`: its runs, their measurements and its pictures."""
