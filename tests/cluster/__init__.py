"""Clusters on one machine: SLURM with two node daemons, network namespaces, small disks."""
