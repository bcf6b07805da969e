"""Parts of the study `reward_kl`: its data, its methods, and rewards at equal KL."""
