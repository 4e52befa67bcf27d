"""The library that the quantization scripts share. README.md, "Layout", says what each module is
for.
"""

from common.base.environment import check_script

check_script()
