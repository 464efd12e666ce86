"""LAWS for ROS 2: a library of certified experts in front of a large learned policy (arXiv:2605.04069)."""

__version__ = "0.1.0"
