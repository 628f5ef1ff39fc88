"""`moelora demo`: train a small mixture of LoRA experts on real text and compare it, in one run."""
