import pytest
import torch

from fusion_backend.kernels import support
from fusion_backend.kernels.support import why_unsupported

GPU = torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with triton and a GPU that is just new enough."""
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_ampere_gpu_with_triton_runs_all_our_dtypes(dtype: torch.dtype) -> None:
    assert why_unsupported(GPU, dtype) is None


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32, torch.float8_e4m3fn])
def test_names_an_unsupported_dtype_and_the_allowed_ones(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert why_unsupported(GPU, dtype) == f"dtype {name} is not one of float32, float16, bfloat16"


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta"])
def test_names_a_device_that_is_no_gpu_of_ours(device: str) -> None:
    assert why_unsupported(torch.device(device), torch.float32) == f"device type {device} is not a CUDA or ROCm GPU"


@pytest.mark.usefixtures("ampere")
def test_names_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert why_unsupported(GPU, torch.float32) == "triton is not installed"


@pytest.mark.usefixtures("ampere")
def test_a_cuda_device_on_a_machine_without_one_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_unsupported(GPU, torch.float32) == f"torch {torch.__version__} sees no GPU"


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_names_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_unsupported(GPU, torch.float32) == f"compute capability 7.{capability[1]} of Test GPU is below 8.0"


@pytest.mark.usefixtures("ampere")
def test_an_amd_gpu_has_no_compute_capability_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert why_unsupported(GPU, torch.float32) is None
