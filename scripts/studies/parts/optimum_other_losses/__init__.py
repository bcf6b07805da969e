"""Parts of the study `optimum_other_losses`: its losses and its training runs."""
