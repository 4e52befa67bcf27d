"""Task files for lm-eval and the scoring of single answers."""
