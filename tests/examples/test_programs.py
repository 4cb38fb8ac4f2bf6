"""The example programs run as a user would run them, on the CPU, from another folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    def run(name: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": ""}
        command = [sys.executable, str(ROOT / "examples" / name)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_kernelbench_reports_one_folded_site_and_every_contender(run):
    printed = run("kernelbench.py")
    assert "1 transposed convolution(s), 1 matched" in printed
    assert "y = min(max(x + conv_transpose.bias[c] + bias[c], 0), 0.5)" in printed
    assert re.findall(r"^(\w[\w -]*?)  +\S+e-\d+ +[\d.]+ +[\d.]+x$", printed, re.MULTILINE) == [
        "eager",
        "inductor",
        "fused_post",
    ]
    assert "allclose to eager at 1e-4: eager passes, inductor passes, fused_post passes" in printed
    assert "error ok" in printed


def test_decoder_reports_each_transposed_convolution_once_for_inference_and_once_for_training(run):
    inference, training = run("decoder.py").split("where gradients are wanted")
    assert "6 transposed convolution(s), 4 matched" in inference
    for equation in (
        "y = x + up1.bias[c]",
        "y = max(norm2.scale[c]*x + norm2.shift[c], 0)",
        "y = min(max(gain3[c]*x + up3.bias[c]*gain3[c], 0), 6)",
        "y = min(max(0.5*x + 0.5*shift4[c] + 0.5, 0), 1)",
    ):
        assert equation in inference
    for reason in ("tanh at decoder.py:", "its value has 2 users", "cat at decoder.py:"):
        assert reason in inference
    assert "6 transposed convolution(s), 4 matched" in training
    assert training.count("one bit an element kept for the backward") == 1


def test_the_autoencoder_trains_to_eagers_loss(run):
    printed = run("train_autoencoder.py")
    losses = dict(re.findall(r"^(\w+) +[\d.]+ +([\d.]+) +[\d.]+$", printed, re.MULTILINE))
    assert losses.keys() == {"eager", "fused_post"}
    assert float(losses["fused_post"]) == pytest.approx(float(losses["eager"]), rel=0.05)
    assert "2 transposed convolution(s), 2 matched" in printed
