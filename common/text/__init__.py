"""Text and questions: rows of data sets, chat templates, token windows, the probe text, overlap
with calibration text.
"""
