"""What everything stands on: errors, files, devices and their memory, several processes, progress.
Knows no model and no method.
"""
