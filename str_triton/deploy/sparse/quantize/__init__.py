"""Networks on 8-bit integers: calibration, the graph on integers, its report."""
