"""Flags of XLA for tests that start runs, whose time is compilation, of which they take half. Programs run slower and
round more, so that tests which compare to the last bits leave the second out."""

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
