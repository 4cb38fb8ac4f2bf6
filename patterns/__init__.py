"""Reading graphs: which nodes form a site, and what the site computes. No kernels, no devices.

``convolution``  a transposed convolution, from any dialect, as one frozen record
``vocabulary``   a pointwise operation, from any dialect, as one canonical call
``operand``      what stands beside the value in such a call: a number, or one value per channel
``steps``        what such a call does to the value: affine and clamp steps
``coefficient``  arithmetic on numbers and per-channel values that become known only when the model runs
``algebra``      the normal form of a run of affine and clamp steps
``gradient``     where such a run passes a gradient on
``barrier``      what may stand between a convolution and the end of its tail
``site``         the walk that puts these together
"""

if __name__ == "patterns":
    raise ImportError("this folder is imported as fusion_backend.patterns")
