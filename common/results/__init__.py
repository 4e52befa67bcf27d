"""Results on disk: under which name, what they were made from, and whether they answer for what is
asked now.
"""
