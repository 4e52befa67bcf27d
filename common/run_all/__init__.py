"""What run_all_quantization.sh needs besides the batch: the check of the machine, options that are
passed on.
"""
