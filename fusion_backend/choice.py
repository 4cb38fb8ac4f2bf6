"""Which implementation a site gets, and why.

``auto`` takes a kernel of ours only where measurements on the same kind of GPU show it to be faster than Inductor: the
fused kernel, by the plan that was fastest at the most similar measured convolution (``evidence``), or at this very one
where the user asks for measuring now (``autotune``). Everywhere else it leaves the site to Inductor, with the tail
folded. The epilogue kernel moves the same bytes as the pointwise kernel that Inductor makes of the tail, and is no
faster, so ``auto`` never takes that in inference. In training it takes that or the fused kernel where whole steps are
measured to be faster, or as fast with less memory kept for the backward (``training``).
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_backend import autotune, training
from fusion_backend.evidence import LEAST_SPEEDUP, Prediction, copy_rate, gpu_name, predict
from fusion_backend.kernels.arguments import axes_for
from fusion_backend.kernels.plans import choose_plan, plan_named
from fusion_backend.kernels.problem import Problem, problem_for
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.support import why_unsupported
from fusion_backend.options import Options
from fusion_backend.patterns.coefficient import is_infinite, leaves
from fusion_backend.patterns.gradient import Gate
from fusion_backend.patterns.program import Program
from fusion_backend.patterns.site import Site
from fusion_backend.patterns.source import needs_gradient, value_of
from fusion_backend.program_text import rereads, trained, written
from fusion_backend.surroundings import Surroundings, is_read_from_memory, is_stored, saves_a_pass

# Instructions of a program that are a few multiply-adds and comparisons.
SIMPLE = ("affine", "add", "sub", "mul", "minimum", "maximum", "leaky_relu", "prelu")

UNKNOWN_LAYOUT = "which layout Inductor gives the convolutions beside it cannot be told"
RELAID_IN_TRAINING = (
    "a contiguous site among convolutions that Inductor may turn channels_last is not measured in training"
)

LEARNED_SCALE = "its scale is learned, and without the convolution's value the gradient of that takes a convolution"
REREAD = "what is added to it may be written to before the backward, which would read it again"
RELU_ALONE = "its result, which the next operation keeps, tells where the gradient of a relu passes"

NO_WAY = "its residual would have to become channels_last"

ALONE = Surroundings()


@dataclass(frozen=True)
class Choice:
    """``kernel`` is "fused", "epilogue", "inductor", or None where the site stays as the user wrote it.

    ``training``: by ``fused_post::conv_transpose_training``, which keeps one bit an element for the backward.
    ``program``: the fused kernel takes the site's too, where it has one; else Inductor gets it, in a pass of its own.
    ``prologue``: and the site's prologue, which is else Inductor's. ``keeps``: the program of which a value is kept, in
    the place of the other.
    """

    kernel: str | None
    why: str
    training: bool = False
    plan: str | None = None  # of the fused kernel: the name of a measured one, or None for the operator's own rule
    relayout: bool = False  # a contiguous site becomes channels_last
    program: bool = True
    prologue: bool = False
    keeps: bool = False
    folds: bool = True  # where Inductor keeps the site, it gets the tail's normal form if that is shorter


def choose(site: Site, options: Options, around: Surroundings = ALONE) -> Choice:
    requested, functions = options.kernel, around.functions
    if site.keeping is not None and not _is_simple(site.keeping):
        site = replace(site, keeping=None)
    if "_make_dual" in functions:
        return Choice(None, "a forward-mode tangent flows through it, and folding would change it at the bounds")
    if "_vmap_increment_nesting" in functions and torch.is_grad_enabled():
        return Choice(None, "inside torch.vmap the graph does not record whether a gradient flows through it")
    trains = site.gate is not None
    transform = next((name for name in _TRANSFORMS if name in functions), None)
    problem = f"it has no rule for {_TRANSFORMS[transform]}" if transform else None
    saves = trains and not problem and not why_no_bits(site) and site.convolution.value.device.type == "cpu"
    if requested == "inductor":
        return _inductor(site, "asked for", saves)
    problem = problem or why_no_kernel(site)
    if trains and not problem and any(leaf.learned for leaf in leaves(site.form.scale)):
        problem = LEARNED_SCALE
    if not problem and (requested != "epilogue" or trains) and site.convolution.weight is None:
        problem = "the convolution is a module call, which keeps its weight to itself"
    if requested == "auto":
        return _auto(site, options, around, problem, trains, saves)
    if problem:
        return _inductor(site, f"the {requested} kernel cannot run: {problem}", saves)
    if trains:
        return _training_asked_for(site, requested, saves)
    if requested != "fused":
        return Choice(requested, "asked for")
    relayout = is_relaid(site, around) is True
    keeps = not relayout and _keeps(site, options)
    site = taken(site, requested, relayout, prologue=True, keeps=keeps)
    plan = _plan_asked_for(site, options, relayout)
    prologue = site.prologue is not None
    return Choice(requested, "asked for", plan=plan, relayout=relayout, prologue=prologue, keeps=keeps)


def _keeps(site: Site, options: Options) -> bool:
    """Whether one kernel that stores two values is faster than one that stores the first and a pass behind it.

    As it is measured, or else where the result is read from memory: a pass that writes it would read the first again.
    """
    if site.keeping is None:
        return False
    both = replace(site, program=site.keeping)
    if not is_read_from_memory(both.whole):
        return False
    alone, together = (measured_plan(each, options) for each in (site, both))
    if isinstance(alone, str):
        return True
    return isinstance(together, Prediction) and together.speedup > alone.speedup


def _is_simple(program: Program) -> bool:
    """Whether it takes a kernel no time to speak of, so that what a pass costs is memory alone.

    Measured on an H200: DAC's decoder takes 11 % longer where its snakes' sines are worked out by the few warps of a
    product than where they are in a pass behind it.
    """
    return all(each.name in SIMPLE for each in program.instructions)


def _auto(site: Site, options: Options, around: Surroundings, problem: str | None, trains: bool, saves: bool) -> Choice:
    if trains:
        return _trained(site, options, around, problem, saves)
    if problem:
        return _inductor(site, f"no kernel of ours is taken: {problem}", saves)
    relayout = is_relaid(site, around)
    if relayout is None:
        return _inductor(site, f"no kernel of ours is taken: {UNKNOWN_LAYOUT}", saves)
    program = site.program is None or taken(site, "fused", relayout).program is not None
    plain = replace(site, prologue=None)
    found = measured_plan(plain, options, relayout) if program else NO_WAY
    if site.program is not None:
        bare = measured_plan(replace(plain, program=None), options, relayout, left=True)
        if isinstance(found, str) or (isinstance(bare, Prediction) and bare.speedup > found.speedup):
            found, program = bare, False
    keeps = False
    if site.keeping is not None and not relayout:
        both = measured_plan(replace(plain, program=site.keeping), options)
        if isinstance(both, Prediction) and (isinstance(found, str) or both.speedup > found.speedup):
            found, program, keeps = both, True, True
            site = replace(site, program=site.keeping)
    if isinstance(found, str):
        return _inductor(site, found, saves)
    if options.measures:
        faster = f"measured to have {found.speedup:.2f} times the speed of Inductor"
    else:
        case = f"the most similar measured case, {found.case}"
        faster = f"predicted to have {found.speedup:.2f} times the speed of Inductor at {case}"
    if found.speedup < LEAST_SPEEDUP:
        return _inductor(site, f"the fused kernel is {faster}", saves)
    packed = f"{found.packed_bytes / 1024:.0f} KiB for the packed weight"
    layout = ", in channels_last like the convolutions beside it" if relayout else ""
    behind = "" if program else ", and a pass of Inductor's behind it"
    prologue = not relayout and _takes_prologue(site if program else replace(site, program=None), found.plan)
    if prologue:
        behind += ", with the steps before it"
    why = f"{faster}, by {found.plan}{layout}{behind}; {packed}"
    return Choice("fused", why, plan=found.plan, relayout=relayout, program=program, prologue=prologue, keeps=keeps)


def _takes_prologue(site: Site, plan: str) -> bool:
    """Whether the prologue costs nothing in the kernel, and a pass outside of it.

    It costs nothing where the plan turns x in any case. Elsewhere x is activated whenever it is loaded, for each tap
    anew, and what that costs is not measured. What Inductor works out itself, it works out together with the prologue.
    """
    before, found = site.prologue, problem_of(replace(site, prologue=None))
    named = plan_named(found[0], plan) if found is not None else None
    if before is None or named is None or not named.turned:
        return False
    return is_stored(before.x) and value_of(before.x).is_contiguous()


def _training_asked_for(site: Site, requested: str, saves: bool) -> Choice:
    why = "asked for"
    if site.program is not None and not _learns_nothing(site):
        if not rereads(site):
            return Choice(requested, f"{why}; {_kept_for(site, requested)}", training=True)
        why = f"{why}; {REREAD}"
    if not site.tail and site.convolution.bias is None:
        return _inductor(site, "there is nothing to fold", saves)
    return Choice(requested, why, training=True, program=False)


def _kept_for(site: Site, kernel: str) -> str:
    """What of a program is kept for the backward, in words."""
    if _result_tells(site):
        return "its result tells the gradient, and nothing is kept beside it"
    if kernel == "fused":
        return "nothing but x is kept, and the backward computes the convolution once more"
    return "the convolution's result is kept"


def _result_tells(site: Site) -> bool:
    """Whether the result of the site's program tells the gradient."""
    from fusion_backend.kernels.program_backward import of_result  # which needs triton

    return of_result(written(trained(site))[0]) is not None


def _trained(site: Site, options: Options, around: Surroundings, problem: str | None, saves: bool) -> Choice:
    if site.convolution.value.device.type == "cpu" and problem:
        return _inductor(site, f"no kernel of ours is taken: {problem}", saves)
    if not problem and is_relaid(site, around) is not False:
        problem = RELAID_IN_TRAINING
    if not problem and site.program is not None and not _learns_nothing(site) and not rereads(site):
        found = problem_of(replace(site, program=None))
        kind = training.kind_of(written(trained(site))[0], _result_tells(site))
        best = found and training.predict(*found, kind, gpu_name(site.convolution.value.device))
        if isinstance(best, training.Prediction) and best.is_taken and best.way != training.FOLDED:
            return Choice(best.way, f"{_in_training(best)}; {_kept_for(site, best.way)}", training=True)
    site = replace(site, program=None)
    why = why_no_bits(site)
    if not problem and why != RELU_ALONE:
        problem = why
    if problem:
        return _as_written(f"no kernel of ours is taken: {problem}", saves, site)
    found = problem_of(site)
    if found is None:
        return _as_written("its sizes are not known even roughly", saves, site)
    kind = training.RELU if why == RELU_ALONE else training.BOUNDS
    best = training.predict(*found, kind, gpu_name(site.convolution.value.device), options.replayed)
    if isinstance(best, str):
        return _as_written(f"no kernel of ours is measured in training: {best}", saves, site)
    if not best.is_taken:
        return _as_written(f"the {best.way} way is {_in_training(best)}", saves, site)
    if best.way == training.FOLDED:
        return _inductor(site, f"folded it is {_in_training(best)}", saves_bits=False)
    return Choice(best.way, _in_training(best), training=True, program=False)


def _in_training(best: training.Prediction) -> str:
    case = f"the most similar measured case, {best.case}"
    predicted = f"predicted to have {best.speedup:.2f} times the speed of Inductor in training at {case}"
    return f"{predicted}, keeping {best.kept:.2f} of what Inductor keeps for the backward"


def _as_written(why: str, saves_bits: bool, site: Site) -> Choice:
    """Folded by operations that have the same gradient, a tail is no faster as a rule, and can be slower: measured."""
    if saves_bits:
        return _inductor(site, why, saves_bits)
    return Choice("inductor", f"{why}; the tail as written", folds=False)


def _plan_asked_for(site: Site, options: Options, relayout: bool) -> str | None:
    """The measured one or, where nothing is measured, the rule's; None where sizes are unknown."""
    measured = measured_plan(site, options, relayout)
    if isinstance(measured, Prediction):
        return measured.plan
    found = problem_of(site, relayout)
    return choose_plan(*found).name if found else None


def is_relaid(site: Site, around: Surroundings) -> bool | None:
    """Whether a contiguous site among Inductor's convolutions is one that Inductor turns channels_last with them."""
    value = site.convolution.value
    if site.convolution.rank != 2 or layout_of(value)[0]:
        return False
    # What is in both layouts at once would come back with strides of the other.
    one = all(isinstance(size, int) and size == 1 for size in value.shape[-2:])
    return None if around.relayout and one else around.relayout


def measured_plan(site: Site, options: Options, relayout: bool = False, left: bool = False) -> Prediction | str:
    """What the measurements on this site's GPU say of it, those made now included, or why they say nothing.

    ``left``: Inductor does the rest of the tail, in a pass that the peers fuse with theirs. Measured peers have a pass
    for the tail; where the site's would save none, that counts as one on our side.
    """
    found = problem_of(site, relayout)
    if found is None:
        return "its sizes are not known even roughly"
    problem, shape = found
    left = left or not saves_a_pass(site.whole)
    device = site.convolution.value.device
    gpu = gpu_name(device)
    copied = (_copied_bytes(site, problem, shape) if relayout else 0) + (left and 2 * _result_bytes(problem, shape))
    copied += _result_bytes(problem, shape) if problem.kept else 0
    rate = copy_rate(gpu) if copied else math.inf
    if rate is None and options.measures:
        rate = autotune.copy_rate(device)
    if rate is None:
        nothing = predict(problem, shape, gpu)
        if isinstance(nothing, str):
            return nothing
        return f"it would take copies, for the layout or the tail beside it; how fast {gpu} copies is not measured"
    beside = copied / rate
    if options.measures:
        alone = problem_of(replace(site, program=None, prologue=None), relayout)
        assert alone is not None, "it has the same sizes"
        return autotune.measure(alone[0], problem, shape, device, gpu, options.replayed, beside)
    return predict(problem, shape, gpu, options.replayed, beside)


def _copied_bytes(site: Site, problem: Problem, shape: tuple[int, ...]) -> int:
    """Of a copy of x and one of the result, read and written.

    Where these are fused with what stands before and behind, as in a U-Net, there are fewer. A result that leaves the
    graph is turned back, which takes about twice as long as a copy.
    """
    leaves = any(user.op == "output" for name in site.whole.aliases for user in name.users)
    x = math.prod(shape) * problem.dtype.itemsize
    return 2 * (x + (2 if leaves else 1) * _result_bytes(problem, shape))


def _result_bytes(problem: Problem, shape: tuple[int, ...]) -> int:
    axes = problem.axes[5 - len(shape) :]
    sizes = (axis.output_size(size) for axis, size in zip(axes, shape[2:], strict=True))
    return shape[0] * problem.C_out * problem.groups * math.prod(sizes) * problem.dtype.itemsize


def problem_of(site: Site, relayout: bool = False) -> tuple[Problem, tuple[int, ...]] | None:
    """The convolution as kernels see it, and x's shape. What varies is as in this call; None where that is unknown."""
    convolution = site.convolution
    x, weight = (value_of(node) for node in (site.x, convolution.weight) if node is not None)
    dtype = convolution.value.dtype
    hints = [hint_of(size) for size in x.shape]
    shape = tuple(hint for hint in hints if hint is not None)
    if len(shape) < len(hints) or not all(isinstance(size, int) for size in weight.shape):
        return None
    sizes = (convolution.stride, convolution.padding, convolution.output_padding or (0,), convolution.dilation)
    axes = axes_for(convolution.rank, weight.shape[2:], *sizes)
    last, allow_tf32 = layout_of(convolution.value)
    problem = problem_for(x.to(dtype), weight, axes, convolution.groups, bool(last), allow_tf32)
    if relayout:
        problem = replace(problem, x_last=shape[1] != 1 and max(shape[2:]) > 1, out_last=True)
    spans = (cdiv(axis.output_size(size), axis.stride) for axis, size in zip(axes, shape[2:], strict=True))
    problem = replace(problem, positions=shape[0] * math.prod(spans), prologue=site.prologue is not None)
    if site.program is not None:
        _, columns = written(site.program.instructions)
        kept = site.program.kept is not None
        problem = replace(problem, tensors=len(site.program.tensors), columns=len(columns), kept=kept)
    return problem, shape


def taken(
    site: Site,
    kernel: str | None,
    relayout: bool = False,
    program: bool = True,
    prologue: bool = False,
    keeps: bool = False,
) -> Site:
    """The site as a kernel takes it: with its program's nodes in the tail, or without a program.

    A residual of a site that becomes channels_last would have to as well, in a pass of its own. A prologue is done in
    the pass in which x does, by Inductor.
    """
    if kernel != "fused" or relayout or not prologue:
        site = replace(site, prologue=None)
    residual = relayout and site.program is not None and bool(site.program.tensors)
    if kernel not in ("fused", "epilogue") or residual or not program:
        return replace(site, program=None)
    return (replace(site, program=site.keeping) if keeps and site.keeping is not None else site).whole


def hint_of(size: Any) -> int | None:
    """A size, or where it varies, what it is in the call that is compiled."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else None


def layout_of(value: Any) -> tuple[bool | None, bool]:
    """Of a convolution's output: ``channels_last``, as eager's convolution has it (None, as the input has it, where
    strides are not recorded), and ``allow_tf32``, as the user has it.

    The last stride tells the layout of a single pixel, and the channel's that of a single channel.
    """
    stride = getattr(value, "stride", None)
    if not callable(stride):
        return None, allows_tf32()
    is_last = statically_known_true(stride(1) == 1) and statically_known_true(stride(-1) == value.shape[1])
    return bool(is_last), allows_tf32()


def allows_tf32() -> bool:
    """The user's switch for convolutions."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


# Which of Dynamo's calls begin a transform that our operators have no rule for.
_TRANSFORMS = {"_vmap_increment_nesting": "torch.vmap", "_grad_increment_nesting": "torch.func.grad"}


def _inductor(site: Site, why: str, saves_bits: bool) -> Choice:
    if saves_bits:
        return Choice("inductor", f"{why}; folded, and one bit an element kept for the backward", training=True)
    before, after = len(site.tail), site.form.operations
    folded = f"{before} operations folded into {after}" if site.is_shorter_folded else "the tail as written"
    return Choice("inductor", f"{why}; {folded}")


def why_no_bits(site: Site) -> str | None:
    """Why the backward of the site needs no bits, or cannot keep them; None where it can."""
    convolution, form = site.convolution, site.form
    if convolution.weight is None:
        return "the convolution is a module call, which keeps its weight to itself"
    if convolution.channel_dim != 1:
        return "the convolution has no batch dimension"
    if is_infinite(form.lo) and is_infinite(form.hi):
        return "the tail has no bounds"
    if _learns_nothing(site):
        return "the convolution itself learns nothing"
    if any(leaf.learned for leaf in leaves(form.scale)):
        return LEARNED_SCALE
    if form.lo == 0.0 and is_infinite(form.hi) and site.gate == Gate(lo_open=True):
        return RELU_ALONE
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _learns_nothing(site: Site) -> bool:
    """Of the convolution; then what is kept for its backward is kept for nothing."""
    convolution = site.convolution
    return not any(node and needs_gradient(value_of(node)) for node in (convolution.x, convolution.weight))


def why_no_kernel(site: Site) -> str | None:
    """Why no Triton kernel of ours can run the site, or None where one can."""
    value = site.convolution.value
    device = getattr(value, "device", None)
    if device is None:
        return "the graph does not record a device"
    if site.convolution.channel_dim != 1:
        return "the convolution has no batch dimension"
    if not isinstance(value.shape[1], int):
        return "the number of channels varies between calls"
    return why_unsupported(device, value.dtype)
