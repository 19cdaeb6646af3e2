"""The steps of a sweep: plan, calibrate, score, publish; the only place that knows their order."""
