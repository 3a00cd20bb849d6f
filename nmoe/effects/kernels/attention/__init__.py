"""Attention kernels; one reference each in `pure/model/attention`."""
