"""Calibration: from second moments of queries, keys and values to the arrays of codecs."""
