"""What models are evaluated on: a file for each task, and its prompts as lm-eval reads them."""
