"""Run where the wheel is installed: torch knows the name, and imports nothing of ours before the name is used."""

import sys

import torch
import torch._dynamo


def ours() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in ("fusion_backend", "patterns", "kernels")]


def main() -> None:
    assert not ours(), f"import torch imported {ours()}"
    assert "fused_post" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
    assert not ours(), f"list_backends imported {ours()}"

    conv = torch.nn.ConvTranspose2d(4, 4, 3, stride=2).eval()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(conv, backend="fused_post")(x), conv(x))

    import fusion_backend

    assert "site-packages" in str(fusion_backend.__file__), fusion_backend.__file__
    print(f"fused_post works by name from {fusion_backend.__file__}")


if __name__ == "__main__":
    main()
