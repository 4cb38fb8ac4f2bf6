"""Whether our Triton kernels can run for a device and a dtype, and if not, why not. Does not import triton."""

import importlib.util

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# bfloat16 arithmetic and max.NaN exist from Ampere on.
OLDEST_CAPABILITY = (8, 0)


def why_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why our kernels cannot run on ``device`` for ``dtype``, in words for a user; None if they can.

    AMD GPUs carry the device type "cuda" in a ROCm build of torch; they have no compute capability to check.
    """
    if dtype not in DTYPES:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        return f"dtype {str(dtype).removeprefix('torch.')} is not one of {allowed}"
    if device.type not in ("cuda", "hip"):
        return f"device type {device.type} is not a CUDA or ROCm GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"compute capability {capability[0]}.{capability[1]} of {name} is below {OLDEST_CAPABILITY[0]}.0"
    return None
