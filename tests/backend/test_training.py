"""Training through the backend: eager's gradients, what is kept for the backward, and the ways in which users train."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import dynamo
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import CASES, Case
from benchmarks.measure import TOLERANCE
from fusion_backend import backend as backend_module
from fusion_backend import cache_key, choice, explain, fused_post
from fusion_backend.kernels.tf32 import round_to_tf32
from fusion_backend.patterns.site import Site, find_sites

STRICT = {"fused_post.strict": True}


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_codegen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's rewrite and AOTAutograd, but no generated C++: the same graphs, run operation by operation."""

    def compiler(gm: Any, example_inputs: Any) -> Any:
        return aot_eager(gm, example_inputs)

    compiler.reset, compiler.config = (lambda: None), {}  # type: ignore[attr-defined]
    monkeypatch.setattr(backend_module.opt, "inductor", lambda mode, options: compiler)


class Model(nn.Module):
    """Everything a tail can hold: a bias that is learned, one that is not, a gain."""

    def __init__(self, tail: Callable[[Any, Tensor], Tensor], bias: bool = True, rank: int = 2) -> None:
        super().__init__()
        self.up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1](4, 6, 3, 2, 1, 1, bias=bias)
        shape = (6, *(1,) * rank)
        self.bias = nn.Parameter(torch.randn(shape))
        self.gain = nn.Parameter(torch.rand(shape) + 0.5)
        self.register_buffer("shift", torch.randn(shape))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.up(x))


def seed(m: Any, y: Tensor) -> Tensor:
    return torch.clamp(torch.clamp(y + m.bias, 0.0, 1.0) * 2.0, 0.0, 1.0) / 2.0


TAILS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "seed": seed,
    "clamp": lambda m, y: y.clamp(-0.5, 0.5),
    "relu6": lambda m, y: F.relu6(y + m.shift),
    "a hard sigmoid": lambda m, y: F.relu6(y + 3) / 6,
    "a gain": lambda m, y: (y * m.gain + m.bias).clamp(-0.5, 1) * -2,
    "a bias behind a relu": lambda m, y: F.relu(y * 2 - 1) + m.bias,
    "one bound": lambda m, y: (y - m.bias).clamp_max(0.25) / 3,
    "mixed rules": lambda m, y: F.relu(y + 0.5).clamp(max=1.0) - 1,
    "in place": lambda m, y: y.add_(m.bias).clamp_(-1, 1).mul_(0.5),
    "a learned bound": lambda m, y: torch.clamp(y * 2, min=m.bias) + 1,
    "one that ends early": lambda m, y: torch.minimum(y.clamp(-1, 1) * 2, m.shift) + m.bias,
    "shifted far": lambda m, y: F.relu6(y) * 1e-3 + 1000,
    "a gain of a buffer": lambda m, y: (y * m.shift + m.bias).clamp(-0.5, 1) * -2,
    "affine": lambda m, y: (y * 2 + m.bias) * 3 - m.shift,
}
every_tail = pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)


def step(forward: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = forward(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, inputs, grad, materialize_grads=True, allow_unused=True)]


def compiled(model: nn.Module, **kwargs: Any) -> Any:
    return torch.compile(model, backend=fused_post, options=STRICT, fullgraph=True, **kwargs)


@every_tail
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_are_eagers(without_codegen: None, tail: Any, rank: int) -> None:
    for bias in (True, False):
        model = Model(tail, bias, rank)
        x = torch.randn(2, 4, *(5, 4, 3)[:rank])
        torch.testing.assert_close(step(compiled(model), model, x), step(model, model, x))
        assert explain(model, x).sites[0].matched


@pytest.mark.parametrize("name", ["seed", "a gain", "mixed rules", "shifted far"])
def test_gradients_are_eagers_in_generated_code(name: str) -> None:
    model, x = Model(TAILS[name]), torch.randn(2, 4, 5, 4)
    torch.testing.assert_close(step(compiled(model), model, x), step(model, model, x))


@every_tail
def test_gradients_are_eagers_where_the_fold_is_plain_torch(
    without_codegen: None, tail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on devices where keeping bits is not measured."""
    monkeypatch.setattr(choice, "why_no_bits", lambda site: "not measured")
    model, x = Model(tail), torch.randn(2, 4, 5, 4)
    torch.testing.assert_close(step(compiled(model), model, x), step(model, model, x))


BOUNDARY = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf, -0.0, 0.25])


@pytest.mark.parametrize("bits", [True, False], ids=["bits", "plain torch"])
@pytest.mark.parametrize(
    "tail",
    [
        lambda y: (y.clamp(0, 1) * 2).clamp(-1, 1) / 2,
        lambda y: F.relu6(y * 2 - 1) + 1,
        lambda y: F.relu(y - 1).clamp(max=2) * 3,
        lambda y: -F.relu(-(y + 1) * 2),
        lambda y: F.hardtanh(y + 1, 0.0, 2.0) * 0.5,
        lambda y: (F.relu(y) * 2).clamp(min=0) * 2,
    ],
    ids=["clamp", "relu6", "relu then clamp", "negated relu", "hardtanh", "clamp on a relu's bound"],
)
def test_on_the_bounds_and_at_nan_the_gradient_is_eagers_to_the_bit(
    without_codegen: None, monkeypatch: pytest.MonkeyPatch, tail: Any, bits: bool
) -> None:
    """Through a convolution by 1, which changes no value; every step is exact on these."""
    if not bits:
        monkeypatch.setattr(choice, "why_no_bits", lambda site: "not measured")
    weight = torch.ones(1, 1, 1)

    def function(x: Tensor) -> Tensor:
        return tail(F.conv_transpose1d(x, weight))

    neighbours = (torch.nextafter(BOUNDARY, torch.tensor(to)) for to in (math.inf, -math.inf))
    values = torch.cat([BOUNDARY, *neighbours])
    # Where the CPU takes several elements at a time, hardtanh treats a NaN otherwise than everywhere else.
    values = values if bits else values[~values.isnan()]
    expected = [gradient(function, value.view(1, 1, 1)) for value in values]
    result = gradient(compiled(function), values.view(1, 1, -1))
    torch.testing.assert_close(result, torch.cat(expected, 2), rtol=0, atol=0, equal_nan=True)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def saved(forward: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd keeps for the backward beside inputs and parameters."""
    kept: list[Tensor] = []
    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        forward(x)
    own = {t.data_ptr() for t in (x, *model.parameters())}
    return [t for t in kept if t.data_ptr() not in own]


@pytest.mark.parametrize("name", ["seed", "relu6", "a hard sigmoid", "mixed rules", "one bound"])
def test_of_the_outputs_size_only_one_bit_an_element_is_kept(name: str) -> None:
    model, x = Model(TAILS[name]), torch.randn(2, 4, 8, 8)
    y = model(x)
    kept = saved(compiled(model), model, x)
    assert [t.numel() for t in kept if t.dtype == torch.uint8] == [y.numel() // 8]
    assert max(t.numel() for t in kept) == max(x.numel(), model.up.weight.numel())


def test_the_report_says_what_is_kept() -> None:
    model, x = Model(seed), torch.randn(2, 4, 5, 4)
    (site,) = explain(model, x).sites
    assert site.matched and "one bit an element kept for the backward" in site.reason
    with torch.no_grad():
        assert "one bit" not in explain(model, x).sites[0].reason
    relu = Model(lambda m, y: F.relu(y))
    assert "the tail as written" in explain(relu, x).sites[0].reason


ENDS = [
    (lambda m, y: torch.minimum(y, m.shift) * 2 + 1, "halved on the bound"),
    (lambda m, y: y.clamp(0, 1).mul(m.gain), "whether the scale behind it is zero"),
    (lambda m, y: y.clamp(0, 1) + m.bias, "behind the shift float32 cannot tell"),
    (lambda m, y: F.relu6(y) * 1e-4 + 300, "behind the shift float32 cannot tell"),
    (lambda m, y: torch.clamp(y, min=m.bias) * 2, "the gradient of a learned bound"),
    (lambda m, y: y.clamp(0, 1).clamp(2, 3), "no value that passes a gradient"),
    (lambda m, y: torch.clamp(y, m.shift, m.bias), "known only at run time"),
]


@pytest.mark.parametrize(("tail", "reason"), ENDS, ids=[reason for _, reason in ENDS])
def test_what_one_bit_cannot_hold_ends_the_tail_in_training_alone(tail: Any, reason: str) -> None:
    model, x = Model(tail), torch.randn(2, 4, 5, 4)
    assert reason in explain(model, x).sites[0].reason
    with torch.no_grad():
        assert reason not in explain(model, x).sites[0].reason


def test_one_compiled_module_serves_every_mode() -> None:
    model, x = Model(seed), torch.randn(2, 4, 5, 4)
    forward = compiled(model)
    for mode in (model.train, model.eval):
        mode()
        torch.testing.assert_close(step(forward, model, x), step(model, model, x))
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                torch.testing.assert_close(forward(x), model(x))
    torch.testing.assert_close(step(forward, model, x), step(model, model, x))


@pytest.mark.parametrize(
    "frozen", [["up.weight"], ["up.bias", "bias"], ["up.weight", "up.bias"], ["up.weight", "up.bias", "bias", "gain"]]
)
def test_frozen_parameters(without_codegen: None, frozen: list[str]) -> None:
    model, x = Model(TAILS["a gain"]), torch.randn(2, 4, 5, 4)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    torch.testing.assert_close(step(compiled(model), model, x), step(model, model, x))


def test_an_input_without_a_gradient(without_codegen: None) -> None:
    model, x = Model(seed), torch.randn(2, 4, 5, 4)
    gradients = []
    for forward in (compiled(model), model):
        model.zero_grad()
        forward(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["seed", "a gain", "relu6"])
def test_autocast_is_no_further_from_float64_than_eager(without_codegen: None, dtype: torch.dtype, name: str) -> None:
    model, x = Model(TAILS[name]), torch.randn(2, 4, 16, 16)
    double = copy.deepcopy(model).double()
    exact = step(double, double, x.double())
    with torch.autocast("cpu", dtype):
        ours, eager = step(compiled(model), model, x), step(model, model, x)
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype
        errors = [(t.double() - true).square().mean().sqrt() for t in (mine, theirs)]
        assert errors[0] <= 2 * errors[1] + 0.1 * torch.finfo(dtype).eps


def test_a_gradient_scaler_steps_as_in_eager(without_codegen: None) -> None:
    x, weights = torch.randn(2, 4, 8, 8), []
    start = Model(seed)
    for compile_it in (True, False):
        model = copy.deepcopy(start)
        forward = compiled(model) if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*weights, rtol=2e-2, atol=2e-3)


def test_a_checkpointed_tail_is_computed_again_and_not_kept() -> None:
    model, x = Model(seed), torch.randn(2, 4, 8, 8)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False).square()

    forward = compiled(checkpointed)
    assert explain(checkpointed, x.requires_grad_()).sites[0].matched
    torch.testing.assert_close(step(forward, model, x), step(checkpointed, model, x))
    assert sum(t.nbytes for t in saved(forward, model, x) if t.dtype == torch.uint8) == 0


def accumulate(tail: Any) -> None:
    model = Model(tail)
    twin = copy.deepcopy(model)
    forward = compiled(model)
    for x in torch.randn(3, 2, 4, 5, 4):
        forward(x).square().sum().backward()
        twin(x).square().sum().backward()
    torch.testing.assert_close(*([p.grad for p in m.parameters() if p.grad is not None] for m in (model, twin)))


@every_tail
def test_gradients_accumulate(without_codegen: None, tail: Any) -> None:
    """Two biases, of shapes [C] and [C, 1, 1], have one gradient, and must not share its memory."""
    accumulate(tail)


def test_gradients_accumulate_in_generated_code() -> None:
    accumulate(seed)


def test_functional_optimizers(without_codegen: None) -> None:
    """Parameters as arguments, gradients by torch.func inside the compiled function."""
    model, x = Model(seed), torch.randn(2, 4, 5, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def update(parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        gradients = torch.func.grad(loss)(parameters)
        return {name: p - 0.1 * gradients[name] for name, p in parameters.items()}

    torch.testing.assert_close(compiled(update)(parameters, x), update(parameters, x))


def test_gradients_inside_vmap_are_eagers_on_the_bounds(without_codegen: None) -> None:
    """Dynamo does not record there that a gradient flows, so the site is left alone."""
    weight, bias = torch.ones(1, 3, 1, 1), torch.zeros(3, 1, 1, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return torch.vmap(lambda x: F.relu6((F.conv_transpose2d(x, weight, stride=2) + bias) * 2) / 2)(x)

    x = torch.randn(2, 1, 1, 3, 3)
    gradients = [torch.autograd.grad(f(x).sum(), bias)[0] for f in (compiled(function), function)]
    torch.testing.assert_close(*gradients)


def test_a_varying_float64_scalar_needs_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """AOTAutograd starts over when it meets one, by an exception that is no failure."""
    model, x = Model(lambda m, y: (y * m.factor).clamp(-1, 1) * 2), torch.randn(2, 4, 5, 4)
    model.factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    forward = torch.compile(model, backend=fused_post)
    with caplog.at_level("WARNING"):
        ours, eagers = step(forward, model, x), step(model, model, x)
    # Both add the factor's gradient up in float32, each in its own order, and only then is it float64.
    torch.testing.assert_close([each.float() for each in ours], [each.float() for each in eagers])
    assert [each.dtype for each in ours] == [each.dtype for each in eagers]
    assert not [record for record in caplog.records if record.name.startswith("fusion_backend")]


@pytest.mark.parametrize(
    ("frozen", "reason"), [(["up.weight", "up.bias"], "learns nothing"), ([], "its scale is learned")]
)
def test_bits_are_kept_only_where_they_pay(frozen: list[str], reason: str) -> None:
    model, x = Model(TAILS["a gain"]), torch.randn(2, 4, 5, 4)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    assert "one bit" not in explain(model, x).sites[0].reason
    gm = dynamo(model, x)
    (site,) = find_sites(gm)
    assert isinstance(site, Site) and reason in (choice.why_no_bits(site) or "")


def test_what_an_operator_is_made_of_is_part_of_the_key_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd's cache would go on with the operators of an earlier version."""
    tags: list[str] = []

    def compiler(gm: Any, example_inputs: Any) -> Any:
        tags.append(torch.compiler.config.cache_key_tag)
        return aot_eager(gm, example_inputs)

    compiler.reset, compiler.config = (lambda: None), {}  # type: ignore[attr-defined]
    monkeypatch.setattr(backend_module.opt, "inductor", lambda mode, options: compiler)
    model, x = Model(seed), torch.randn(2, 4, 5, 4)
    compiled(model)(x)
    torch._dynamo.reset()
    monkeypatch.setattr(cache_key, "_hash_of_kernels", lambda: "another version")
    compiled(model)(x)
    assert tags[0] != tags[1] and "another version" in tags[1]
    assert "another version" not in torch.compiler.config.cache_key_tag


def test_sizes_that_vary(without_codegen: None) -> None:
    model = Model(seed)
    forward = compiled(model, dynamic=True)
    for shape in ((2, 4, 5, 4), (3, 4, 7, 6), (1, 4, 9, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(step(forward, model, x), step(model, model, x))


def test_a_second_derivative_is_an_error_in_words() -> None:
    model, x = Model(seed), torch.randn(1, 4, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(compiled(model)(x).sum(), x, create_graph=True)
    message = "double backward" if torch.__version__ >= "2.13" else "does not require grad"  # AOTAutograd's own
    with pytest.raises(RuntimeError, match=message):
        first.sum().backward()


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


PLACES = [pytest.param("auto", "cpu"), *(pytest.param(k, "cuda", marks=GPU) for k in ("auto", "fused", "epilogue"))]


@pytest.mark.parametrize(("kernel", "device"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_public_case(
    name: str, dtype: torch.dtype, kernel: str, device: str, request: pytest.FixtureRequest
) -> None:
    """By the rule of Dynamo's own accuracy check: RMSE <= 2 * eager's + a tenth of the tolerance, relative."""
    if device == "cpu":
        request.getfixturevalue("without_codegen")
    # A gate that falls the other way is an error of its own: it takes many elements for the rates to be compared.
    case = CASES[name].small() if device == "cpu" else CASES[name].small(images=8, pixels=64 * 64)
    for memory_format in case.memory_formats:
        check_gradients(case, dtype, kernel, device, memory_format)


def check_gradients(
    case: Case, dtype: torch.dtype, kernel: str, device: str, memory_format: torch.memory_format
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.model().to(device, dtype)
    x, *others = case.inputs(device, dtype, memory_format)
    forward = torch.compile(model, backend=fused_post, options={**STRICT, "fused_post.kernel": kernel})
    doubles = [other.double() for other in others]

    def in_float64(rounded: Callable[[Tensor], Tensor]) -> Any:
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            exact.conv.weight.copy_(rounded(model.conv.weight))
        return step(lambda x: exact(x, *doubles), exact, rounded(x).double())

    expected = in_float64(lambda tensor: tensor)
    ours = step(lambda x: forward(x, *others), model, x)
    eager = step(lambda x: model(x, *others), model, x)
    # Where the fused kernel may take TF32 and cuDNN, which may too, takes none, its rounding is the measure.
    tf32 = in_float64(round_to_tf32) if kernel == "fused" and dtype == torch.float32 else eager
    last = eager
    if device == "cuda" and case.rank > 1 and memory_format is torch.contiguous_format:
        # A backward of ours goes to cuDNN channels_last, where it may take TF32 though it takes none elsewhere.
        to = {2: torch.channels_last, 3: torch.channels_last_3d}[case.rank]
        turned = copy.deepcopy(model)  # not Module.to, which wants any parameter of 4 axes to have 5
        turned.conv.to(memory_format=to)
        last = step(lambda x: turned(x, *others), turned, x.to(memory_format=to))
    for mine, *theirs, true in zip(ours, eager, tf32, last, expected, strict=True):
        size = true.square().mean().sqrt()
        error, *allowed = [(t.double() - true).square().mean().sqrt() for t in (mine, *theirs)]
        assert error <= 2 * max(allowed) + TOLERANCE[dtype] / 10 * size


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 4, 4)
        self.up1 = nn.ConvTranspose2d(8, 8, 2, 2)
        self.up2 = nn.ConvTranspose2d(8, 1, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.up1(self.down(x)) + 3) / 6
        return (self.up2(x).clamp(-1, 1) + 1) / 2


def train(forward: Callable[[Tensor], Tensor], model: nn.Module, steps: int = 200) -> Tensor:
    """The loss of every step, on products of two smooth curves."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ramp = torch.linspace(0, 6, 12)
    phases = torch.rand(8, 4, 2, generator=torch.Generator().manual_seed(0)) * 6
    data = torch.sigmoid(3 * torch.sin(ramp[:, None] + phases[..., :1, None]) * torch.sin(ramp + phases[..., 1:, None]))
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(forward(data[i % 8, :, None]), data[i % 8, :, None])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_an_autoencoder_trains_as_in_eager() -> None:
    """200 steps; the curves differ by no more than eager's with other convolution algorithms, and a loss's rounding."""
    start = Autoencoder()

    def curve(how: Callable[[nn.Module], Any], **to: Any) -> Tensor:
        model = copy.deepcopy(start).to(**to)
        return train(how(model), model)

    def eager(**to: Any) -> Tensor:
        return curve(lambda model: model, **to)

    expected, last = eager(), eager(memory_format=torch.channels_last)
    with torch.backends.mkldnn.flags(enabled=False):
        others = [last, eager(), eager(memory_format=torch.channels_last)]
    allowed = max((expected - other).abs().max() for other in others) + torch.finfo(torch.float32).eps * expected.max()
    ours, inductor = curve(compiled), curve(torch.compile)
    assert ours[-1] < ours[0] / 4
    assert (ours - expected).abs().max() <= allowed
    assert (ours - inductor).abs().max() <= allowed
