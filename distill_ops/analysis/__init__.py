"""What the kernels cost, read from their compiled code: no GPU needed.

Example:
    >>> from distill_ops import ForwardKL
    >>> from distill_ops.analysis import aot, forms
    >>> target = aot.TARGETS["sm_90"]  # H100
    >>> (launch,) = forms.Form(n_cols=32000).launches(ForwardKL(), target)
    >>> counts = forms.count(launch, target)
    >>> sorted(counts.fast())  # the sweeps over a row
    ['differentiate', 'normalise']
    >>> 0 < counts.special() < counts.instructions()  # of an element
    True
"""
