"""The numbers of each form on the CPU path and the kernels, against the references."""
