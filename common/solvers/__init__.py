"""Which integers stand for a matrix of weights: functions of weights and statistics, whatever model
they come from.
"""
